"""A run of the benchmark: its processes, its prompts, and one timing."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.summary import LLAMA
from benchmarks.workers import ContestantError, Worker
from refusal import prompts, weights
from refusal.files import CompendiumError
from refusal.options import DEFAULT_MODEL

BATCH = 96


@dataclasses.dataclass
class Bench:
    """A run: its options, its results so far, and the processes that are open.

    Attributes:
        model: Registry id.
        dtype: Of all contestants, or "auto" until the engine has said what that is.
        result: What the JSON file holds.
        path: The JSON file, None in tests.
        began: When this run began, seconds of `time.monotonic`.
        workers: By contestant, model and dtype.
        absent: Contestants that cannot be measured, and why.
        about: What the engine says about each (model, dtype).
        stage: The stage under way.
        until: When the stage will probably end.
        after: Seconds that the stages after it will probably take.
    """

    model: str
    dtype: str = "auto"
    result: dict = dataclasses.field(default_factory=dict)
    path: Path | None = None
    began: float = dataclasses.field(default_factory=time.monotonic)
    workers: dict[tuple[str, str, str], Worker] = dataclasses.field(default_factory=dict)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    about: dict[tuple[str, str], dict] = dataclasses.field(default_factory=dict)
    stage: str = ""
    until: float = 0.0
    after: float = 0.0

    def say(self, what: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        seconds_left = max(0.0, self.until - time.monotonic()) + self.after
        left = f"   about {seconds_left / 60:.0f} min left" if self.until else ""
        print(f"[{minutes:02d}:{seconds:02d}] {self.stage:12} {what}{left}", flush=True)

    def worker(self, contestant: str, model: str = "", dtype: str = "") -> Worker:
        """The contestant's process, started and warmed up where it is not running.

        Raises:
            ContestantError: It cannot be started; it is not tried again in this run.
            CompendiumError: The same of the engine, without which nothing can be measured.
        """
        key = (contestant, model or self.model, dtype or self.dtype)
        if key in self.workers:
            return self.workers[key]
        if contestant in self.absent:
            raise ContestantError(self.absent[contestant])
        folder = key[1]
        if folder != LLAMA:
            try:
                folder = str(weights.fetch(key[1]))
            except CompendiumError as error:
                if key[1] == self.model:
                    raise
                raise ContestantError(str(error)) from error  # the rest can do without the second model
        job = {"model": key[1], "folder": folder, "dtype": key[2], "tokenizer": DEFAULT_MODEL}
        try:
            if key[1] == LLAMA:
                job["vocabulary"] = self.told()["vocabulary"]
            self.workers[key] = Worker(contestant, job)
            self.result.setdefault("packages", {})[contestant] = self.workers[key].packages
            if contestant == "engine":
                self.about[key[1:]] = self.workers[key].ask({"op": "describe"})
            measure(self, contestant, (1.0,), texts(16), new=4, model=model, dtype=dtype, quiet=True)  # the warm-up
        except ContestantError as error:
            self.drop(contestant, str(error))
            if contestant == "engine":
                raise CompendiumError(f"the engine cannot be measured: {error}.") from error
            raise
        return self.workers[key]

    def told(self, model: str = "", dtype: str = "") -> dict:
        """What the engine says about a model: layer, stop_ids, pad and so on."""
        key = (model or self.model, dtype or self.dtype)
        if key not in self.about:
            self.worker("engine", model, dtype)
        return self.about[key]

    def drop(self, contestant: str, why: str) -> None:
        """Takes a contestant out of the run."""
        self.absent[contestant] = why
        self.close(contestant)
        self.say(f"{contestant}: not run: {why}")

    def close(self, contestant: str = "", model: str = "", dtype: str = "") -> None:
        """Ends the processes that fit; "" fits all."""
        for key in [*self.workers]:
            if all(
                not wanted or wanted == found for wanted, found in zip((contestant, model, dtype), key, strict=True)
            ):
                self.workers.pop(key).close()


@dataclasses.dataclass
class Measured:
    """One timing as the results hold it, and the completions, which they never hold: conditions x prompts x ids."""

    timing: dict
    tokens: list[list[list[int]]]


@functools.cache
def texts(count: int) -> tuple[str, ...]:
    """The prompts: half harmful, half harmless; evaluation prompts as far as they reach."""
    parts = []
    for kind in ("harmful", "harmless"):
        names = [f"{kind}_{name}" for name in ("evaluation", "selection", "extraction")]
        every = [text for name in names for text in prompts.load(name)["text"]]
        parts += every[: count // 2]
    return tuple(parts)


def measure(
    bench: Bench,
    contestant: str,
    alphas: Sequence[float],
    of: Sequence[str],
    *,
    new: int,
    forced: bool = False,
    batch: int = BATCH,
    score: bool = False,
    profile: bool = False,
    model: str = "",
    dtype: str = "",
    quiet: bool = False,
) -> Measured:
    """Has one contestant complete every text at every alpha, and times it.

    Args:
        bench: The run.
        contestant: Its name.
        alphas: The conditions.
        of: The prompts.
        new: Most tokens of a completion.
        forced: Go on to `new` tokens whatever the model says.
        batch: Prompts at a time; the engine decides by itself.
        score: The engine scores the completions by the unsteered model as well.
        profile: Say where the time goes (`shares`); that takes time itself.
        model: "" for the run's.
        dtype: "" for the run's.
        quiet: Print nothing.
    """
    about = bench.told(model, dtype)
    engine, worker = bench.worker("engine", model, dtype), bench.worker(contestant, model, dtype)
    asked: dict[str, Any] = {"op": "generate", "max_new_tokens": new, "profile": profile}
    if contestant == "engine":
        asked |= {"texts": list(of), "alphas": list(alphas), "forced": forced, "score": score}
    else:
        asked |= engine.ask({"op": "encode", "texts": list(of)})
        asked |= engine.ask({"op": "vectors", "alphas": list(alphas)})
        asked |= {"layer": about["layer"], "pad": about["pad"], "batch": batch}
        asked["stop_ids"] = [-1] if forced else about["stop_ids"]
    made = worker.ask(asked)
    tokens = made.pop("tokens")
    timing = {
        "contestant": contestant,
        "model": model or bench.model,
        "alphas": list(alphas),
        "conditions": len(alphas),
        "prompts": len(of),
        "rows": len(alphas) * len(of),
        "max_new_tokens": new,
        "forced": forced,
        "scored": score,
        "batch": 0 if contestant == "engine" else batch,
        "tokens": sum(len(ids) for column in tokens for ids in column),
        **made,
    }
    if not quiet:
        work = f"{len(alphas):2} alphas x {len(of):3} prompts" + (f", batch {batch}" if batch != BATCH else "")
        rate = timing["tokens"] / timing["seconds"]
        bench.say(
            f"{contestant:16} {work:32} {timing['seconds']:7.1f} s {rate:7.0f} tokens/s {timing['peak_gb']:5.1f} GB"
        )
    return Measured(timing, tokens)


def attempt(bench: Bench, contestant: str, *arguments: Any, **more: Any) -> Measured | None:  # noqa: ANN401
    """`measure`; a peer that fails is taken out of the run, and the reason is kept."""
    try:
        return measure(bench, contestant, *arguments, **more)
    except ContestantError as error:
        if contestant == "engine":
            raise CompendiumError(f"the engine cannot be measured: {error}.") from error
        if contestant not in bench.absent:
            bench.drop(contestant, str(error))
        return None


def agreement(
    bench: Bench,
    name: str,
    of: Sequence[str],
    found: dict[float, list[list[int]]],
    reference: dict[float, list[list[int]]],
) -> list[dict]:
    """A line an alpha: how many completions equal the reference's token for token, and how many labels are equal."""
    shared = [alpha for alpha in reference if alpha in found]
    ask = bench.worker("engine").ask
    labels = [
        ask({"op": "labels", "texts": list(of), "tokens": [table[alpha] for alpha in shared]})["labels"]
        for table in (found, reference)
    ]
    return [
        {
            "contestant": name,
            "alpha": alpha,
            "compared": len(of),
            "same_tokens": sum(a == b for a, b in zip(found[alpha], reference[alpha], strict=True)),
            "same_labels": sum(a == b for a, b in zip(labels[0][place], labels[1][place], strict=True)),
        }
        for place, alpha in enumerate(shared)
    ]
