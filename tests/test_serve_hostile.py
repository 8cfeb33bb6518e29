"""Bodies that were changed at random: each ends in an answer of ours, and the service goes on.

SANA_DEPLOY_HOSTILE=10000 pytest -n 0 tests/test_serve_hostile.py
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from PIL import Image
from serving import Running, running, two_small_gpus

BODIES = int(os.environ.get("SANA_DEPLOY_HOSTILE", "500"))
EXPECTED = {200, 400, 404, 405, 408, 411, 413, 415, 421, 429, 431}
BOUNDARY = b"edgeofparts"
NASTY = (
    b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"null", b"true",
    b"{}", b"[", b"[" * 2000, b'{"a":' * 2000, b'"', b"\\", b"\r\n", b"--" + BOUNDARY, b"--" + BOUNDARY + b"--\r\n",
    b"data:image/png;base64,", b"http://127.0.0.1:1/x", b"file:///etc/passwd", b"../../etc/passwd", b"%s%n",
    b'"n":256,', b'"size":"8192x8192",', b'"steps":1000,', b'"seed":-1,', "\u202e\U0001f600".encode(), b'"stream":1,',
)  # fmt: skip


def picture(random_: random.Random) -> bytes:
    buffer = io.BytesIO()
    mode = random_.choice(("1", "L", "P", "RGB", "RGBA", "LA", "I;16"))
    form = "PNG" if mode in ("1", "P", "RGBA", "LA", "I;16") else random_.choice(("PNG", "JPEG", "WEBP"))
    Image.new(mode, (random_.randint(1, 64), random_.randint(1, 64))).save(buffer, form)
    return buffer.getvalue()


def json_body(random_: random.Random) -> bytes:
    values: dict[str, Any] = {"prompt": "a fox", "size": "64x64", "steps": 1, "n": 1, "seed": 1}
    if random_.random() < 0.7:
        content = picture(random_)
        values["control_image"] = base64.b64encode(
            changed(content, random_) if random_.random() < 0.7 else content
        ).decode()
    if random_.random() < 0.3:
        key = random_.choice(list(values))
        values[key] = random_.choice([None, [], {}, -1, 0, 1e308, "", "x" * 5000, True, [[]], {"a": 1}, "64x64"])
    return json.dumps(values).encode()


def form_body(random_: random.Random) -> bytes:
    content = picture(random_)
    content = changed(content, random_) if random_.random() < 0.7 else content
    disposition = b'Content-Disposition: form-data; name="'
    fields = {b"prompt": b"a fox", b"size": b"64x64", b"steps": b"1", b"n": b"1"}
    parts = [disposition + key + b'"\r\n\r\n' + value for key, value in fields.items()]
    parts.append(disposition + b'image"; filename="../../a.png"\r\nContent-Type: image/png\r\n\r\n' + content)
    return b"".join(b"--" + BOUNDARY + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + BOUNDARY + b"--\r\n"


def changed(body: bytes, random_: random.Random) -> bytes:
    """The body with some of it cut out, doubled, turned over or replaced by what is nasty."""
    for _ in range(random_.randint(1, 4)):
        at, length = random_.randrange(len(body) + 1), random_.randint(0, 30)
        match random_.randrange(5):
            case 0:
                body = body[:at] + body[at + length :]
            case 1:
                body = body[:at] + body[at : at + length] * 2 + body[at + length :]
            case 2:
                body = body[:at] + bytes(random_.randrange(256) for _ in range(length)) + body[at + length :]
            case 3:
                body = body[:at] + random_.choice(NASTY) + body[at:]
            case _:
                body = body[:at]
    return body


KINDS: dict[str, tuple[str, Callable[[random.Random], bytes]]] = {
    "application/json": ("/v1/images/generations", json_body),
    f"multipart/form-data; boundary={BOUNDARY.decode()}": ("/v1/images/edits", form_body),
}


def sent(api: Running, kind: str, body: bytes, path: str) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection(*api.address, timeout=30)) as connection:
        connection.request("POST", path, body, {"Content-Type": kind, "Host": "localhost"})
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.mark.parametrize("kind", KINDS, ids=["json", "form"])
def test_changed_bodies_end_in_answers_of_ours_and_the_service_goes_on(
    kind: str, asleep: Callable[[int], list[Any]]
) -> None:
    random_, codes = random.Random(20), Counter[int]()
    path, make = KINDS[kind]
    with running(two_small_gpus(), *asleep(1), max_body="1MiB", most_steps=60) as api:
        assert sent(api, kind, make(random.Random(7)), path)[0] in (200, 400)
        for number in range(BODIES // 2):
            body = changed(make(random_), random_)
            status, answer = sent(api, kind, body, path)
            codes[status] += 1
            assert status in EXPECTED, (number, status, body[:500], answer[:500])
            assert b"Traceback" not in answer
            if status != 200:
                error = json.loads(answer)["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert 0 < len(error["message"]) < 1000, error
        assert api.engine.standing.working == 0
        assert api.engine.standing.waiting == 0
        good = json.dumps({"prompt": "a fox", "size": "64x64", "steps": 1}).encode()
        assert sent(api, "application/json", good, "/v1/images/generations")[0] == 200
    assert codes[400] > BODIES // 6, codes
