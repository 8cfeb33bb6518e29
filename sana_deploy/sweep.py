"""Multirun: the Hydra callback that sums up a sweep, and the command line of a sweep that is resumed.

The summary itself is made from the jobs' files (`report/summary.py`), also where a sweep was interrupted.
"""

from __future__ import annotations

import atexit
import json
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from .errors import ComposeError, UsageError
from .facts.libraries import install_hint
from .report.jobs import NO_OUTCOME, RESUME
from .report.summary import NUMBERS, cells_of, read_rows, swept_keys, write_summary

warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
"""Hydra's note that our file of a launcher has the name of its plugin's own, which is what is wanted."""
TERMINAL_ROWS = 20
"""Rows that the terminal shows; the files have all."""
_TITLES = (
    "GPUs",
    "fullest",
    "peak",
    "~s/image",
    "~images/s",
    "images/s",
    "seconds",
    "PSNR",
    "worst error",
    "per step",
    "measured peak",
    "knobs",
)
"""Titles that the terminal shows, as many as there is room for beside _NAME_CELLS of a job's name."""
_NAME_CELLS = 36
_LAUNCHER = "hydra/launcher="
_EXTRAS = ("joblib", "submitit", "ray")


@dataclass
class _State:
    """The sweep of this process: its folder, what stdout carries, and its exit code once it is summed up."""

    folder: Path | None = None
    output: str = "text"
    code: int | None = None


_state = _State()


class SweepSummary(Callback):  # type: ignore[misc]
    """Sums up a multirun once its last job has ended."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember the folder: a sweep that is interrupted or fails is summed up when the process ends."""
        folder = Path(str(OmegaConf.select(config, "hydra.sweep.dir"))).absolute()
        _state.folder, _state.output, _state.code = folder, str(OmegaConf.select(config, "output")), None
        atexit.register(finish)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write and print the summary."""
        finish()


def finish() -> int:
    """Write and print the summary of the sweep that is running in this process, once; return its exit code.

    A job that is infeasible is a result: the code is the highest of the others.
    """
    if _state.folder is not None and _state.code is None:
        _state.code = summarise(_state.folder, _state.output)
    return _state.code or 0


def summarise(folder: Path, output: str = "text") -> int:
    """Write and print the summary of every job folder below a sweep's; return the sweep's exit code.

    Raises:
        InputError: the folder cannot be written.
    """
    return _summarised(folder, read_rows(folder), output)


def _summarised(folder: Path, rows: list[dict[str, Any]], output: str) -> int:
    from .report.terminal import console

    out = console()
    written = write_summary(folder, rows) if rows else []
    if rows:
        out.print(render_rows(rows, "utf" not in (out.encoding or "").lower(), out.width))
    if output == "json":
        sys.stdout.write(json.dumps(rows, ensure_ascii=False) + "\n")
    if written:
        suffixes = ", ".join(path.suffix for path in written if path.suffix != ".html")
        out.print(f"saved: {folder / 'summary.html'} (and {suffixes})", soft_wrap=True)
    if any(row["status"] in ("interrupted", "not started") or row["reason"] == NO_OUTCOME for row in rows):
        resume = shlex.quote(f"{RESUME}{folder}")
        out.print(f"go on: python -m sana_deploy -m {resume}", style="green", soft_wrap=True)
    return max((row["exit_code"] for row in rows if row["status"] not in ("done", "infeasible")), default=0)


def main(arguments: Sequence[str]) -> int:
    """Run `sana-deploy summary FOLDER`: sum up a sweep from its files once more.

    Raises:
        UsageError: it holds no jobs.
    """
    folder = Path(arguments[0]).absolute() if len(arguments) == 1 else Path()
    rows = read_rows(folder) if len(arguments) == 1 else []
    if not rows:
        problem = "name one folder"
        if len(arguments) == 1:
            problem = f"{folder} holds no jobs of a sweep" if folder.is_dir() else f"there is no folder {folder}"
        raise UsageError(problem, where="summary", hint="python -m sana_deploy summary outputs/multirun/DATE/TIME")
    return _summarised(folder, rows, "text")


def command_line(arguments: Sequence[str]) -> list[str]:
    """Return what Hydra is given: `sweep.resume=FOLDER` becomes what the sweep in FOLDER was started with, there.

    Flags and `hydra` overrides that are given win over the saved ones, e.g. another launcher.

    Raises:
        UsageError: the folder holds no sweep, or other overrides are given than it was started with.
        ComposeError: a launcher is not installed.
    """
    for launcher in (one.removeprefix(_LAUNCHER) for one in arguments if one.startswith(_LAUNCHER)):
        extra = launcher.partition("_")[0]
        if extra in _EXTRAS and not _installed(f"hydra-{extra}-launcher"):
            hint = install_hint(extra, [f"hydra-{extra}-launcher"])
            raise ComposeError(f"the plugin hydra-{extra}-launcher is not installed", where="hydra/launcher", hint=hint)
    named = [argument for argument in arguments if argument.startswith(RESUME)]
    if not named:
        return list(arguments)
    folder = Path(named[-1].removeprefix(RESUME).strip("'\"")).expanduser().absolute()
    if not (folder / "multirun.yaml").is_file():
        hint = "name the sweep's own folder, outputs/multirun/DATE/TIME"
        raise UsageError(f"{folder} holds no sweep: it has no multirun.yaml", where="sweep.resume", hint=hint)
    saved = OmegaConf.load(folder / "multirun.yaml").hydra.overrides
    task = [str(one) for one in saved.task if not str(one).startswith(RESUME)]
    rest = [one for one in arguments if one not in named and one not in ("-m", "--multirun")]
    flags = [one for one in rest if one.startswith(("-", "hydra"))]
    other = [one for one in rest if one not in flags and one not in task]
    if other:
        raise UsageError(
            f"sweep.resume goes on with the sweep as it was started; {', '.join(other)} would change it",
            where="sweep.resume",
            hint="leave them out, or start a new sweep",
        )
    keys = {one.partition("=")[0] for one in flags} | {"hydra.mode", "hydra.sweep.dir"}
    kept = [str(one) for one in saved.hydra if str(one).partition("=")[0] not in keys]
    return ["--multirun", *flags, *task, *kept, f"hydra.sweep.dir='{folder}'", f"{RESUME}'{folder}'"]


def _installed(distribution: str) -> bool:
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


def is_finished(folder: Path, overrides: Sequence[str]) -> bool:
    """Whether the job in `folder` ended with a result, for the same overrides: then a resumed sweep keeps it."""
    try:
        outcome = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
        return outcome["overrides"] == list(overrides) and outcome["status"] in ("done", "infeasible")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def render_rows(rows: list[dict[str, Any]], ascii_only: bool = False, width: int = 80) -> Any:
    """Return a rich table of the best rows, one line each, and below it why jobs did not end well."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    star = "*" if ascii_only else "★"
    pairs = zip(rows, cells_of(rows), strict=True)
    started = [pair for pair in pairs if pair[0]["status"] != "not started"][:TERMINAL_ROWS]
    shown, cells, names = [row for row, _ in started], [cell for _, cell in started], _short_names(rows)
    needed = min(_NAME_CELLS, max(len(name) for name in names.values()))
    titles, room = [], width - 8
    hidden = () if _several(rows) else ("~images/s",)  # one over the seconds
    for title in (one for one in _TITLES if cells and one in cells[0] and one not in hidden):
        longest = max(len(text) for text in (title, *(cell[title] for cell in cells)))
        if room - longest - 2 >= needed:
            titles.append((title, longest))
            room -= longest + 2
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("job", justify="right", min_width=3)
    table.add_column("", min_width=1)
    table.add_column("deployment", no_wrap=True)
    for title, longest in titles:
        table.add_column(title, justify="right" if title in NUMBERS else "left", min_width=longest, no_wrap=True)
    for row, cell in zip(shown, cells, strict=True):
        style = {"done": "", "infeasible": "yellow"}.get(row["status"], "red")
        mark = {"done": star if row["front"] else "", "infeasible": "x"}.get(row["status"], "!")
        name = names[row["job"]]
        name = name if len(name) <= room else f"{name[: room - 2]}.."
        table.add_row(str(row["job"]), Text(mark, style=style), Text(name, style=style),
                      *(cell[title] for title, _ in titles))  # fmt: skip
    return Group(table, *(Text(line, style="dim") for line in (*_notes(rows, star), *_reasons(rows))))


def _several(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any job planned more than one replica."""
    return any((row["replicas"] or 1) > 1 for row in rows)


def _short_names(rows: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """What each job sets that others do not; of words that are joined by underscores, the part that differs."""
    keys = swept_keys(rows)
    names: dict[int, list[str]] = {row["job"]: [] for row in rows}
    for key in keys:
        values = [row["overrides"].get(key, "").split("_") for row in rows]
        shortest = min(len(words) for words in values)
        same = [len({words[at] for words in values}) == 1 for at in range(-shortest, shortest)]
        tail = next((n for n, alike in enumerate(reversed(same[:shortest])) if not alike), 0)
        head = next((n for n, alike in enumerate(same[shortest:]) if not alike), 0)
        for row, words in zip(rows, values, strict=True):
            names[row["job"]].append("_".join(words[head : len(words) - tail] if head + tail < shortest else words))
    return {job: " ".join(words) or "all defaults" for job, words in names.items()}


def _notes(rows: Sequence[Mapping[str, Any]], star: str) -> list[str]:
    more = sum(row["status"] != "not started" for row in rows) - TERMINAL_ROWS
    lines = [f"{more} more in summary.html"] if more > 0 else []
    if any(row["front"] for row in rows):
        rate = " and draws more images per second" if _several(rows) else ""
        lines.append(f"{star} nothing of the same model and workload takes fewer seconds and less memory{rate}")
    counts = Counter(row["status"] for row in rows if row["status"] != "done")
    if counts:
        words = {"infeasible": "x infeasible", "not started": "not started"}
        lines.append(", ".join(f"{words.get(status, f'! {status}')}: {n}" for status, n in counts.items()))
    return lines


def _reasons(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why jobs did not end well, jobs with the same reason together."""
    why: dict[str, list[str]] = {}
    for row in rows:
        if row["reason"] and row["reason"] != row["status"]:
            why.setdefault(row["reason"], []).append(str(row["job"]))
    lines = [f"job {', '.join(jobs[:8])}{' ...' if len(jobs) > 8 else ''}: {text}" for text, jobs in why.items()]
    return lines if len(lines) <= 4 else [*lines[:3], f"{len(lines) - 3} more reasons in summary.html"]
