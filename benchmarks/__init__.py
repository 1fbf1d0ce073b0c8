"""The benchmark: `./run_all.sh bench` measures, `python -m benchmarks.page` writes the page from the results alone."""
