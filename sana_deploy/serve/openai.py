"""The wire format: requests and answers of OpenAI's images API, its errors, and what we add to each.

Beyond OpenAI's keys a request may have `guidance_scale`, `steps`, `seed` and what the pipeline reads of
`control_image`, `control_fit`, `conditioning_scale`, `negative_prompt`, `strength` and `pag_scale`; an answer has
`sana_deploy`: plan, seeds and remarks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from ..declare.workload import LARGEST_SIDE, VAE_FACTOR, Request
from ..errors import did_you_mean

PictureFormat = Literal["png", "webp", "jpeg"]
MOST_TEXT = 32_000
"""Characters of a prompt, as OpenAI bounds them; the text encoder takes some 300 tokens."""
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape.

    Args:
        status: HTTP's.
        message: one sentence for the client.
        code: a word for programs.
        param: the key of the request that it is about.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _text(value: Any) -> Any:
    """Refuse text that UTF-8 does not have: JSON may hold halves of surrogate pairs."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("must be text in Unicode, without lone surrogates") from None
    return value


Text = Annotated[str, BeforeValidator(_text)]
Prompt = Annotated[str, Field(max_length=MOST_TEXT), BeforeValidator(_text)]


class ImagesRequest(BaseModel):
    """The body of a request for images, by JSON or as fields of a form. Unknown keys are refused.

    `quality`, `background`, `moderation`, `style` and `user` are OpenAI's and change nothing here; values that ask for
    something else are refused.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    prompt: Annotated[str, Field(min_length=1, max_length=MOST_TEXT), BeforeValidator(_text)]
    model: Text | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: Text | None = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: PictureFormat = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    control_image: Text | None = None
    control_fit: Literal["stretch", "crop", "pad"] = "stretch"
    negative_prompt: Prompt = ""
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    conditioning_scale: Annotated[float, Field(ge=0, le=10)] | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    pag_scale: Annotated[float, Field(gt=0, le=100)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63 - 4096)] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: None = None
    user: Text | None = None

    @field_validator("output_format", mode="before")
    @classmethod
    def _jpg(cls, value: Any) -> Any:
        return "jpeg" if value == "jpg" else value

    @classmethod
    def read(cls, values: Any) -> ImagesRequest:
        """Check decoded JSON.

        Raises:
            ApiError: 400, naming the first key that is not right, and why.
        """
        if not isinstance(values, dict):
            raise ApiError(400, "the body must be a JSON object with at least a prompt", "invalid_type")
        # A null stands for a key that is left out, as clients send it.
        given = {key: value for key, value in values.items() if value is not None}
        try:
            return cls.model_validate(given)
        except ValidationError as problem:
            raise _first_error(problem) from None

    @classmethod
    def read_form(cls, fields: Mapping[str, str]) -> ImagesRequest:
        """Check the fields of a form, whose values are text.

        Raises:
            ApiError: as `read`.
        """
        return cls.read({key: _typed(key, text) for key, text in fields.items()})

    def pixels(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that are asked for, in pixels; those given where none or `auto` is.

        Raises:
            ApiError: 400, the size is no size, or not one that the VAE has.
        """
        if self.size in (None, "auto"):
            return width, height
        match = _SIZE.fullmatch(self.size or "")
        if not match:
            message = f"size must read WIDTHxHEIGHT in pixels, e.g. {width}x{height}, or auto; got {self.size!r:.80}"
            raise ApiError(400, message, "invalid_size", "size")
        sides = [int(side) for side in match.groups()]
        if any(side % VAE_FACTOR or side > LARGEST_SIDE for side in sides):
            near = [min(LARGEST_SIDE, max(VAE_FACTOR, round(side / VAE_FACTOR) * VAE_FACTOR)) for side in sides]
            rule = f"width and height must be multiples of {VAE_FACTOR} up to {LARGEST_SIDE}"
            raise ApiError(400, f"{rule}; {near[0]}x{near[1]} is the nearest that works", "invalid_size", "size")
        return sides[0], sides[1]


def _typed(key: str, text: str) -> Any:
    """The value of a form's field, which is text: a number or a truth value where the key takes one."""
    field = ImagesRequest.model_fields.get(key)
    kinds = {field.annotation, *get_args(field.annotation)} if field else set()
    kinds |= {inner for kind in kinds for inner in get_args(kind)}
    if bool in kinds and text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        if kind in kinds and len(text) <= 40 and re.fullmatch(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?", text):
            return kind(text) if kind is float or text.lstrip("+-").isdigit() else text
    return text


def _first_error(problem: ValidationError) -> ApiError:
    """The first of pydantic's complaints as OpenAI says it."""
    error = problem.errors(include_url=False, include_context=False)[0]
    key = ".".join(str(part) for part in error["loc"][:1])[:64]
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"there is no key {key!r}: {did_you_mean(key, _KNOWN)}", "unknown_parameter", key)
    if error["type"] == "missing":
        return ApiError(400, f"{key} must be given", "missing_parameter", key)
    said = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    value = error.get("input")
    shown = "" if isinstance(value, (dict, list)) or len(str(value)) > 80 else f" (got {value!r})"
    return ApiError(400, f"{key}: {said}{shown}", "invalid_value", key)


_KNOWN = tuple(ImagesRequest.model_fields)


def remark_texts(remarks: Any) -> list[str]:
    """What a client should know of its request, without keys of our configuration."""
    return [re.sub(r"^workload\.", "", f"{remark.where}: {remark.message}") for remark in remarks]


def event(name: str, values: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **values})}\n\n".encode()


def request_of(asked: ImagesRequest) -> Request:
    """The part of a request that fitting a control image reads."""
    return Request(prompt="", control_fit=asked.control_fit, guidance_scale=1.0)
