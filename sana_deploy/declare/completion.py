"""Completion in a shell: Hydra's, with our commands, and with prompts and paths that Hydra's grammar cannot read.

`eval "$(sana-deploy -sc install=bash)"` makes bash ask `sana-deploy -sc query=bash` with the line in COMP_LINE.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from .free_text import FREE_TEXT, key_of

FLAGS = ("-sc", "--shell-completion")
PATHS = (*(key for key in FREE_TEXT if not key.endswith(("prompt", "goal"))), "sweep.resume")
"""Keys whose value may be a file or a folder."""
PROGRAM = "sana-deploy"

_BASH = """
sana_deploy_completion()
{  # Hydra takes words apart at blanks, also those in quotes: the word that is typed is counted the same way
    local parts=($COMP_LINE)
    COMP_CWORD=${#parts[@]}
    [[ "$COMP_LINE" == *" " ]] || COMP_CWORD=$((COMP_CWORD - 1))
    hydra_bash_completion
}
complete -o nospace -o default -F sana_deploy_completion sana-deploy
"""
_BASH_OFF = """
complete -r sana-deploy 2> /dev/null
unset -f sana_deploy_completion hydra_bash_completion
"""


def asked(arguments: Sequence[str]) -> str:
    """What the shell asks, `query=bash` or `install=bash`; empty where it asks nothing."""
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name, _, attached = flag.partition("=")
        if name in FLAGS:
            return attached or value
    return ""


def answer(question: str, commands: Collection[str], configured: Collection[str], hydra: Callable[[], None]) -> int:
    """Write what completes the line, or what installs completion, to stdout; return the exit code.

    Args:
        question: as `asked` gives it.
        commands: words that may come first.
        configured: those of them that take Hydra's overrides.
        hydra: Hydra's own answer, from COMP_LINE to stdout.
    """
    what, _, shell = question.partition("=")
    sys.argv[:] = [PROGRAM, "-sc", question]  # Hydra registers the name of the program that it was started as
    if what != "query":
        hydra()
        sys.stdout.write({"install": _BASH, "uninstall": _BASH_OFF}.get(what, "") if shell == "bash" else "")
        return 0
    line, own = candidates(os.environ.get("COMP_LINE", ""), commands, configured)
    sys.stdout.writelines(f"{one}\n" for one in own)
    if line is not None:
        os.environ["COMP_LINE"] = line
        with contextlib.suppress(Exception, SystemExit):  # a line that cannot be read has no completion
            hydra()
    return 0


def candidates(line: str, commands: Collection[str], configured: Collection[str]) -> tuple[str | None, list[str]]:
    """Return the line that Hydra is asked to complete, None where it can say nothing, and our own candidates.

    Words that Hydra's grammar cannot read, prompts and paths, are left out of the line: they change no candidate.
    """
    try:
        words = shlex.split(line)[1:]
    except ValueError:  # within quotes: a text that only its writer knows
        return None, []
    word = words.pop() if words and not line[-1:].isspace() else ""
    first = [] if words else [name for name in commands if name.startswith(word)]
    if words and words[0] in commands and words.pop(0) not in configured:
        return None, []
    key, equals, value = word.partition("=")
    if equals and key in PATHS:
        return None, [f"{key}={path}" for path in _paths(value)]
    kept = [one for one in words if key_of(one) not in FREE_TEXT and not any(map(str.isspace, one))]
    return " ".join([PROGRAM, *kept, word]), first


def _paths(start: str) -> list[str]:
    """Files and folders that begin with `start`; a folder ends with a slash."""
    before, slash, name = start.rpartition("/")
    folder = Path(f"{before}{slash}")
    entries = folder.iterdir() if folder.is_dir() else ()
    shown = [one for one in entries if one.name.startswith(name) and " " not in one.name]
    return sorted(f"{before}{slash}{one.name}{'/' if one.is_dir() else ''}" for one in shown)
