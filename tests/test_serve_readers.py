"""Clients that do not read their answers hold neither a connection nor memory; slow ones get everything."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from collections.abc import Iterator

import pytest
from PIL import Image
from serving import Running, running, two_small_gpus
from sleeping import Sleeping

LIMIT = 2.0


@pytest.fixture(scope="module")
def api() -> Iterator[Running]:
    with running(two_small_gpus(), Sleeping(0), receive_timeout=LIMIT) as one:
        yield one


def asked(api: Running) -> socket.socket:
    """A connection on which an answer of some 7 MB was asked for."""
    noise = io.BytesIO()
    Image.effect_noise((1024, 1024), 90).convert("RGB").save(noise, "PNG")
    picture = base64.b64encode(noise.getvalue()).decode()
    body = json.dumps({"prompt": "x", "n": 2, "steps": 1, "control_image": picture}).encode()
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    one.settimeout(30)
    one.connect(api.address)
    head = ["POST /v1/images/generations HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    one.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    return one


def read(one: socket.socket, until: int | None = None, pause: float = 0) -> bytes:
    """What comes until the connection ends, or until so many bytes have come."""
    got = bytearray()
    while until is None or len(got) < until:
        try:
            part = one.recv(1 << 18)
        except ConnectionResetError:
            break
        if not part:
            break
        got += part
        time.sleep(pause)
    return bytes(got)


def length_of(head: bytes) -> int:
    (line,) = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return int(line.partition(b":")[2])


def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(api: Running) -> None:
    with asked(api) as one:
        head = read(one, 1)
        time.sleep(2.5 * LIMIT)
        rest = read(one)
        assert len(head + rest) < length_of(head), "the rest of the answer was not kept for it"
    assert api.engine.standing.working == 0


def test_a_client_that_takes_its_answer_slowly_gets_all_of_it(api: Running) -> None:
    with asked(api) as one:
        began = time.monotonic()
        got = read(one, 1)
        head, _, body = got.partition(b"\r\n\r\n")
        wanted = length_of(head)
        while len(body) < wanted:
            part = read(one, 1, pause=LIMIT / 40)
            assert part, f"it was cut off after {len(body)} of {wanted} bytes"
            body += part
        assert len(json.loads(body)["data"]) == 2
        assert time.monotonic() - began > LIMIT, "it took longer than a client may take nothing"
