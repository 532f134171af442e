"""What it costs to bind answers: decode steps of the same rows, free and bound by a grammar.

    python -m bench.bound_answers --repeat 3

Free and bound runs take turns on one engine, so that a noisy machine is noisy to both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from backend.grammar_forms import schema_grammar
from backend.interface import BackendSpec, Grammar
from bench.card import finish, show
from bench.decode_step import BATCHES, CONTEXT, rows
from bench.drive import Driver, Steppable
from bench.opened_engine import opened
from bench.script import Parser, positive, run_script, start_log
from bench.summary import percentile
from config import read_settings

GRAMMARS: dict[str, Grammar | None] = {  # each for longer than any run
    "free": None,
    "json_schema": schema_grammar(
        {"type": "array", "items": {"type": "integer"}, "minItems": 1000}
    ),
    "regex": Grammar("regex", "[0-9 ]{1000,}"),
}


@dataclass(frozen=True, slots=True)
class BoundAnswers:
    """Decode steps of one batch size, milliseconds from one settlement to the next, medians."""

    batch: int
    steps: int  # of the kind with the fewest
    step_ms: dict[str, float]  # by what binds the answers
    shares: dict[str, float]  # of the free speed


def measure(engine: Steppable, spec: BackendSpec, repeat: int) -> Iterator[BoundAnswers]:
    """Each batch size in turn. The first run of each kind warms up and does not count."""
    for batch in BATCHES:
        seconds: dict[str, list[float]] = {kind: [] for kind in GRAMMARS}
        for turn in range(repeat + 1):
            for kind, grammar in GRAMMARS.items():
                workload = replace(rows(batch, spec, 1000 * turn + batch), grammar=grammar)
                run = Driver(engine, workload, batch, f"{kind}-{batch}-{turn}").run()
                if turn:
                    quiet = [work for work in run.steps if work.rows == work.positions == batch]
                    seconds[kind] += [work.interval for work in quiet]
        yield summary(batch, seconds)


def summary(batch: int, seconds: dict[str, list[float]]) -> BoundAnswers:
    """Medians, and what share of the free speed the bound ones have."""
    medians = {kind: percentile(each, 50) or 0.0 for kind, each in seconds.items()}
    free = medians["free"]
    return BoundAnswers(
        batch,
        min(map(len, seconds.values())),
        {kind: round(1000 * median, 3) for kind, median in medians.items()},
        {
            kind: round(free / median, 3)
            for kind, median in medians.items()
            if kind != "free" and median
        },
    )


def main() -> int:
    """Measure, show the card, print the JSON line."""
    parser = Parser(prog="bench.bound_answers", description=__doc__)
    parser.add_argument("--repeat", type=positive, default=1, metavar="N", help="runs of each kind")
    options = parser.parse_args()
    settings = read_settings()
    start_log(settings.log_level)
    with opened(settings) as llm:
        spec = llm.spec
        found = list(measure(llm.engine, spec, options.repeat))
    show(
        f"decode step at context {CONTEXT}, free and bound: {spec.model}, {spec.device}",
        ("batch", *GRAMMARS),
        [
            (str(each.batch), *(f"{each.step_ms[kind]:,.2f} ms" for kind in GRAMMARS))
            for each in found
        ],
    )
    finish({"bound_answers": [asdict(each) for each in found], "model": spec.model})
    return 0


if __name__ == "__main__":
    run_script(main)
