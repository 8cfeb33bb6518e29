"""Ten questions to `sana-deploy advise`, with the head of each answer and a rehearsal of its first machine.

    python benchmarks/advise.py [--out docs/advise.md] [--only NUMBER ...]

Each question is asked in a process of its own, once for its seconds and once with `advise.rehearse=1`. Seconds are
those of all processors together, since the host is shared; as many cores as there are plan at once. The rehearsal runs
the plan of the first machine on virtual GPUs. It counts bytes: it checks that the plan fits and how full GPUs are.
Seconds of an image and images per hour are the planner's estimates; docs/measured.md has some beside measured ones.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

QUESTIONS = (
    ("Which machine draws an image of the 1.6B ControlNet within a second?",
     "model=sana_1600m_controlnet 'advise.goal=seconds<=1'"),
    ("Where is the 0.6B ControlNet cheapest, however long it takes?", "model=sana_600m_controlnet"),
    ("5,000 images an hour of the 1.6B model for at most 5 USD an hour?",
     "model=sana_1600m 'advise.goal=images_per_hour>=5000, budget<=5'"),
    ("Half a second with SANA-Sprint, for at most 2 USD an hour?",
     "model=sana_sprint_1600m 'advise.goal=seconds<=0.5, budget<=2'"),
    ("Images of 4096 px within 12 seconds?", "model=sana_1600m_4k 'advise.goal=seconds<=12'"),
    ("The 4.8B model within 3 seconds?", "model=sana15_4800m 'advise.goal=seconds<=3'"),
    ("100,000 small images an hour, four at once?",
     "model=sana_600m_512 workload.batch=4 'advise.goal=images_per_hour>=100000'"),
    ("The same bits as diffusers, within 1.5 seconds?",
     "model=sana_1600m_controlnet advise.exactness=bitwise 'advise.goal=seconds<=1.5'"),
    ("Below 0.6 seconds and 10,000 images an hour at once?",
     "model=sana_1600m_controlnet 'advise.goal=seconds<=0.6, images_per_hour>=10000'"),
    ("The 1.6B ControlNet for at most 0.6 USD an hour, in 8 bits, on spot machines too?",
     "model=sana_1600m_controlnet precision=int8 advise.spot=true 'advise.goal=budget<=0.6'"),
)  # fmt: skip
HEADING = "## Ten questions\n"
"""Where the page's generated part begins."""
_ROWS = 3


def asked(arguments: str, *further: str) -> tuple[dict[str, Any], float]:
    """The document that answers a question, and the seconds of processors that it took."""
    command = [sys.executable, "-m", "sana_deploy", "advise", *shlex.split(arguments), *further, "output=json"]
    before = _processor_seconds()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 4):
        raise SystemExit(done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer, _processor_seconds() - before


def _processor_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def words(number: int, question: str, arguments: str) -> str:
    """One question and its answer as a part of the page."""
    _, seconds = asked(arguments)
    answer, _ = asked(arguments, "advise.rehearse=1")
    head = (
        "| machine | GPUs | s an image | images/h | USD/h | USD for 1,000 | exactness | fullest GPU | plan | price of |"
    )
    lines = [
        f"### {number}. {question}",
        "",
        f"```sh\nsana-deploy advise {arguments}\n```",
        "",
        head,
        "|" + "---|" * 10,
    ]
    lines += [_row(one) for one in answer["meeting"][:_ROWS]]
    counts = [len(answer[key]) for key in ("meeting", "missing", "unfit")]
    told = f"{counts[0]} machines meet the goals, {counts[1]} miss one, {counts[2]} do not fit."
    rehearsal = answer["meeting"][0]["rehearsal"] if answer["meeting"] else {"words": "nothing to rehearse"}
    return "\n".join(
        [*lines, "", f"{told} Answered in {seconds:.0f} s of processors. Rehearsed: {rehearsal['words']}.", ""]
    )


def _row(one: dict[str, Any]) -> str:
    plan = [f"{one['replicas']} replicas"] if one["replicas"] > 1 else []
    plan += [f"split {one['split']}"] if one["split"] != "none" else []
    cells = (
        f"{one['provider']} {one['instance']}{' (spot)' if one['spot'] else ''}", one["gpus"],
        f"{one['seconds_per_image']:.2f}", f"{one['images_per_hour']:.0f}", f"{one['usd_per_hour']:.2f}",
        f"{one['usd_per_1000_images']:.2f}", one["exactness"], f"{one['fullness']:.0%}",
        ", ".join([*plan, one["runtime"]]), one["prices_of"],
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Ask the questions and print the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"also write them into a page, behind {HEADING.strip()!r}")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the questions to ask; all unless given")
    options = parser.parse_args()
    parts = []
    for number, (question, arguments) in enumerate(QUESTIONS, 1):
        if not options.only or number in options.only:
            parts.append(words(number, question, arguments))
            print(parts[-1], flush=True)
    if options.out:
        page = options.out.read_text(encoding="utf-8").partition(HEADING)[0]
        intro = str(__doc__).partition("\n\n")[2].replace("    python", "    $ python")
        options.out.write_text(f"{page}{HEADING}\n{intro}\n" + "\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
