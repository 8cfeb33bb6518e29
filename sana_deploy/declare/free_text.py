"""Free text in overrides: prompts and paths are quoted before Hydra reads them, so that they stay as they are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError

FREE_TEXT = (
    "workload.prompt",
    "workload.negative_prompt",
    "workload.prompt_file",
    "workload.control_image",
    "model.source",
    "model.cache_dir",
    "model.components.controlnet",
    "plan_file",
    "advise.goal",
    "advise.prices",
)
"""Keys whose value is what a person writes: in a single run, everything behind the `=` belongs to it."""
_NULL = re.compile(r"null", re.IGNORECASE)
_QUOTED = re.compile(r"""\s*(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*""", re.DOTALL)
_UNIT = re.compile(r"(hardware\.(?:pin|device_map))\.(\w+\.\d+)=(.*)", re.DOTALL)
"""A place for a further unit of a component, whose name has a dot: Hydra would read a group of its own."""
_INTERPOLATION = re.compile(r"\$\{[a-zA-Z_.][\w.]*(?::[^{}]*)?\}")


def key_of(override: str) -> str:
    """The key that an override sets, without what stands before it (`+`, `~`)."""
    return override.lstrip("+~").partition("=")[0]


def literal(override: str) -> str:
    """Quote the value of an override where its key takes free text, so that Hydra gives it back as it stands.

    Left in Hydra's grammar: `null`, a value that is wholly in quotes, and one that is a single `${...}`. The place of a
    further unit (`hardware.pin.transformer.1=0`) becomes an entry of its mapping.
    """
    if unit := _UNIT.fullmatch(override):
        return f"{unit[1]}={{{unit[2]}:{unit[3]}}}"
    key, equals, text = override.partition("=")
    if not equals or key.lstrip("+") not in FREE_TEXT:
        return override
    if any(kept.fullmatch(text) for kept in (_NULL, _QUOTED, _INTERPOLATION)):
        return override
    return f"{key}={quoted(text)}"


def quoted(text: str) -> str:
    """Return `text` in double quotes such that Hydra and OmegaConf read exactly it."""
    if text == "???":  # OmegaConf's word for a value that must be given, also in quotes
        return "${oc.decode:'\"???\"'}"
    plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no interpolation: OmegaConf reads backslashes before ${ only
    return '"' + re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), plain) + '"'


def command_texts(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command with free text quoted; those of a sweep stay in Hydra's grammar."""
    swept = any(one in ("-m", "--multirun") or re.match(r"hydra\.mode=.*MULTIRUN", one) for one in arguments)
    return list(arguments) if swept else [literal(one) for one in arguments]


def as_typed(override: str) -> str:
    """Undo `literal`: the override as a person writes it; as it is where that would be read otherwise."""
    key, _, value = override.partition("=")
    if key.lstrip("+") not in FREE_TEXT or not _QUOTED.fullmatch(value):
        return override
    inner = re.sub(r'(\\+)("|$)', lambda m: "\\" * (len(m[1]) // 2) + m[2], value[1:-1])
    typed = f"{key}=" + re.sub(r"(\\+)\$\{", lambda m: "\\" * (len(m[1]) // 2) + "${", inner)
    return typed if literal(typed) == override else override


def quoted_hint(override: str) -> str:
    """Say how a sweep takes free text that is not in Hydra's grammar; empty for other keys."""
    key, _, text = override.partition("=")
    if key.lstrip("+") not in FREE_TEXT:
        return ""
    return f"a sweep reads Hydra's grammar, quote the text: {shlex.quote(f'{key}={quoted(text)}')}"


def prompt_of(path: str) -> str:
    """Read a prompt from a file, without blanks and line ends around it.

    Raises:
        InputError: the file is missing, not UTF-8, or holds no text.
    """
    where, file = "workload.prompt_file", Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as problem:
        message = f"{file} is not UTF-8: byte {problem.start} is {problem.object[problem.start]:#04x}"
        raise InputError(message, where=where, hint="save it as UTF-8") from None
    except (OSError, ValueError) as problem:
        why = "there is no such file" if isinstance(problem, FileNotFoundError) else str(problem)
        raise InputError(f"{file} cannot be read: {why}", where=where, hint="name a text file, or null") from None
    if not text:
        raise InputError(f"{file} holds no text", where=where, hint="write the prompt into it, or use workload.prompt")
    return text
