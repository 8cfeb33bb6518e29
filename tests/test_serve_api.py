"""The contract of the images API, over sockets and on both engines: OpenAI's own client, every way an answer can end,
limits, and who may ask."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx2
import openai
import pytest
from conftest import CHECKOUT
from PIL import Image, ImageFile
from serving import Running, running, two_small_gpus

from sana_deploy.plan.artifact import ResolvedPlan

Asleep = Callable[[int], list[Any]]
SIZE = "96x64"
PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def resolved() -> ResolvedPlan:
    return two_small_gpus()


@pytest.fixture(scope="module")
def api(resolved: ResolvedPlan, asleep: Asleep) -> Iterator[Running]:
    with running(resolved, *asleep(1), max_body="256KiB", max_pixels=250_000, receive_timeout=1.0) as service:
        yield service


@pytest.fixture(scope="module")
def client(api: Running) -> Any:
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0)


def png(width: int = 48, height: int = 32, colour: str = "white", form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, form)
    return buffer.getvalue()


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def picture(data: str | None) -> Any:
    return Image.open(io.BytesIO(base64.b64decode(data or "")))


def post(api: Running, body: Any = None, path: str = PATH, **options: Any) -> httpx2.Response:
    return (
        httpx2.post(f"{api.url}{path}", json=body, timeout=30, **options)
        if body is not None
        else httpx2.post(f"{api.url}{path}", timeout=30, **options)
    )


def refused(answer: httpx2.Response, status: int, says: str, code: str | None = None) -> dict[str, Any]:
    """The error of an answer, which has OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert says in body["error"]["message"]
    assert code is None or body["error"]["code"] == code
    return dict(body["error"])


# What is asked for and what comes


def test_the_openai_client_gets_pictures_that_say_what_they_are(client: Any, resolved: ResolvedPlan) -> None:
    extra = {"seed": 7, "steps": 3, "negative_prompt": "fog"}
    answer = client.images.generate(prompt="a red fox", size=SIZE, n=2, extra_body=extra)
    assert answer.size == SIZE
    assert answer.sana_deploy["seeds"] == [7, 8]
    for seed, one in zip((7, 8), answer.data, strict=True):
        drawn = picture(one.b64_json)
        assert (drawn.format, drawn.size, drawn.getpixel((0, 0))) == ("PNG", (96, 64), (seed, 0, 0))
        facts = json.loads(drawn.text["sana_deploy"])
        assert (facts["plan"], facts["seed"]) == (resolved.plan.digest, seed)
        assert facts["request"] == {
            "prompt": "a red fox", "negative_prompt": "fog", "size": SIZE, "steps": 3, "guidance_scale": 4.5,
            "conditioning_scale": 0.0, "control_fit": "stretch", "control_image": None,
        }  # fmt: skip


def test_a_seed_is_drawn_where_none_is_given_and_draws_the_same_again(api: Running) -> None:
    first, second = (post(api, {"prompt": "x", "size": SIZE, "steps": 1}).json() for _ in range(2))
    assert first["sana_deploy"]["seeds"] != second["sana_deploy"]["seeds"]
    again = post(api, {"prompt": "x", "size": SIZE, "steps": 1, "seed": first["sana_deploy"]["seeds"][0]}).json()
    assert again["data"] == first["data"]


def test_a_control_image_comes_in_json_or_as_a_file_and_is_the_same(client: Any, api: Running) -> None:
    content = png(96, 64, "red")
    common = {"prompt": "a fox", "size": SIZE, "seed": 1, "steps": 1}
    one = post(api, {**common, "control_image": text(content)}).json()
    url = post(api, {**common, "control_image": f"data:image/png;base64,{text(content)}"}).json()
    edited = client.images.edit(
        image=("edges.png", content),
        prompt="a fox",
        size=SIZE,
        extra_body={"seed": 1, "steps": 1},
    )
    assert one["data"][0]["b64_json"] == url["data"][0]["b64_json"] == edited.data[0].b64_json
    drawn = picture(edited.data[0].b64_json)
    assert drawn.getpixel((50, 50)) == (255, 0, 0), "the replica got the control image"
    assert json.loads(drawn.text["sana_deploy"])["request"]["conditioning_scale"] == 1.0


@pytest.mark.parametrize(("form", "compression"), [("webp", 100), ("webp", 60), ("jpeg", 80), ("png", 100)])
def test_every_format_says_what_it_was_made_of(api: Running, form: str, compression: int) -> None:
    body = {"prompt": "ein Füchslein " * 900, "size": SIZE, "steps": 1, "seed": 3, "output_format": form,
            "output_compression": compression, "response_format": "url"}  # fmt: skip
    answer = post(api, body).json()
    head, _, content = answer["data"][0]["url"].partition(",")
    assert head == f"data:image/{form};base64"
    drawn = picture(content)
    assert (drawn.format or "").lower() == form
    facts = json.loads(drawn.text["sana_deploy"] if form == "png" else drawn.getexif()[0x010E])
    assert facts["seed"] == 3
    assert facts["request"]["prompt"].startswith("ein Füchslein")


def test_a_stream_has_previews_steps_as_comments_and_the_picture(client: Any, api: Running) -> None:
    events = list(
        client.images.generate(
            prompt="fox",
            size=SIZE,
            stream=True,
            partial_images=2,
            extra_body={"seed": 5, "steps": 6},
        )
    )
    assert [one.type for one in events] == [*["image_generation.partial_image"] * 2, "image_generation.completed"]
    assert [one.partial_image_index for one in events[:2]] == [0, 1]
    shown = [json.loads(picture(one.b64_json).text["sana_deploy"]) for one in events[:2]]
    assert [facts["unfinished_after_step"] for facts in shown] == [2, 4]
    assert picture(events[2].b64_json).getpixel((0, 0)) == (5, 0, 0)
    assert events[2].sana_deploy["seeds"] == [5]
    edits = client.images.edit(image=png(), prompt="fox", size=SIZE, stream=True, extra_body={"steps": 1})
    assert [one.type for one in edits] == ["image_edit.completed"]
    raw = post(api, {"prompt": "fox", "size": SIZE, "steps": 2, "stream": True})
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert [line for line in raw.text.splitlines() if line.startswith(": step")] == [
        ": step 1 of 2, picture 0", ": step 2 of 2, picture 0",
    ]  # fmt: skip


def test_a_stream_that_fails_ends_in_an_error_that_the_client_raises(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 60"):
        client.images.generate(prompt="x", stream=True, extra_body={"steps": 61})
    with pytest.raises(openai.InternalServerError, match="gave NaN"):
        client.images.generate(prompt="poison", size=SIZE, stream=True)
    stream = client.images.generate(prompt="poison of step 2", size=SIZE, stream=True, extra_body={"steps": 2})
    with pytest.raises(openai.APIError, match="gave NaN"):
        list(stream)


def test_what_a_control_image_went_through_is_said(api: Running) -> None:
    body = {"prompt": "fox", "size": SIZE, "steps": 1, "control_image": text(png(64, 64))}
    (remark,) = post(api, body).json()["sana_deploy"]["remarks"]
    assert remark.startswith("control_fit: the image of 64x64 px is stretched to 96x64 px")
    assert (
        post(api, {**body, "control_fit": "crop"})
        .json()["sana_deploy"]["remarks"][0]
        .startswith("control_fit: the middle")
    )


def test_what_the_service_says_of_itself(client: Any, api: Running, resolved: ResolvedPlan) -> None:
    (model,) = client.models.list().data
    assert model.id == "sana_1600m_controlnet"
    assert client.models.retrieve(model.id).plan == resolved.plan.digest
    assert httpx2.get(f"{api.url}/health").json() == {"status": "alive"}
    assert httpx2.get(f"{api.url}/ready").json() == {"status": "ready", "replicas": 1, "of": 1}
    assert httpx2.get(f"{api.url}/plan").json()["digest"] == resolved.plan.digest
    paths = httpx2.get(f"{api.url}/openapi.json").json()["paths"]
    schema = paths[PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "control_image", "seed", "steps"} <= set(schema["properties"])


# What is refused


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "prompt must be given"),
        ([], "must be a JSON object"),
        ({"prompt": ""}, "prompt: String should have at least 1 character"),
        ({"prompt": 7}, "prompt: must be a valid string (got 7)"),
        ({"prompt": "\ud800"}, "without lone surrogates"),
        ({"prompt": "x" * 32001}, "at most 32000 characters"),
        ({"prompt": "x", "step": 3}, "there is no key 'step': did you mean 'steps'?"),
        ({"prompt": "x", "n": 0}, "n: must be greater than or equal to 1"),
        ({"prompt": "x", "n": 11}, "n is at most 10 here, got 11"),
        ({"prompt": "x", "n": True}, "n: must be a valid integer"),
        ({"prompt": "x", "size": "huge"}, "size must read WIDTHxHEIGHT in pixels, e.g. 1024x1024"),
        ({"prompt": "x", "size": "100x64"}, "multiples of 32 up to 65536; 96x64 is the nearest that works"),
        ({"prompt": "x", "size": "32x99999"}, "32x65536 is the nearest that works"),
        ({"prompt": "x", "steps": 61}, "steps are at most 60 here, got 61; the plan is for 20"),
        ({"prompt": "x", "guidance_scale": float("nan")}, "guidance_scale: must be a finite number"),
        ({"prompt": "x", "seed": -1}, "seed: must be greater than or equal to 0"),
        ({"prompt": "x", "seed": 2**70}, "seed: "),
        ({"prompt": "x", "conditioning_scale": 0.5}, "steers by a control image, and none is given"),
        ({"prompt": "x", "background": "transparent"}, "background: must be 'auto' or 'opaque'"),
        ({"prompt": "x", "output_format": "gif"}, "output_format: must be 'png', 'webp' or 'jpeg'"),
        ({"prompt": "x", "control_image": "http://169.254.169.254/a.png"}, "nothing is fetched or read"),
        ({"prompt": "x", "control_image": "file:///etc/passwd"}, "nothing is fetched or read"),
        ({"prompt": "x", "control_image": "/etc/hostname"}, "control_image is not base64"),
        ({"prompt": "x", "control_image": "~/x.png"}, "control_image is not base64"),
        ({"prompt": "x", "control_image": text(b"no picture")}, "send PNG, JPEG or WebP"),
        ({"prompt": "x", "control_image": text(png(form="GIF"))}, "send PNG, JPEG or WebP"),
        ({"prompt": "x", "control_image": text(png(form="TIFF"))}, "send PNG, JPEG or WebP"),
        ({"prompt": "x", "control_image": text(png()[:50])}, "the image cannot be used"),
        ({"prompt": "x", "control_image": text(png(501, 500))}, "501x500 are 250,500 pixels, more than the 250,000"),
    ],
)  # fmt: skip
def test_a_request_that_is_not_right_is_named(api: Running, body: Any, says: str) -> None:
    raw = json.dumps(body).encode()
    refused(post(api, content=raw, headers={"Content-Type": "application/json"}), 400, says)


def test_a_model_that_is_not_served_is_not_found(client: Any, api: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'dall-e-3' here"):
        client.images.generate(model="dall-e-3", prompt="x")
    assert client.images.generate(model="sana_1600m_controlnet", prompt="x", size=SIZE).data
    refused(httpx2.get(f"{api.url}/v1/models/other"), 404, "there is no model 'other' here", "model_not_found")


def test_a_size_that_the_plan_does_not_hold_is_refused_with_numbers_and_the_largest_that_it_does(api: Running) -> None:
    error = refused(
        post(api, {"prompt": "x", "size": "2048x2048"}), 400, "2048x2048 needs 12.53 GiB on GPU 1 in prepare"
    )
    assert error["message"].endswith("8.00 GiB are there; 1216x1216 fits")
    assert (error["code"], error["param"]) == ("does_not_fit", "size")
    assert post(api, {"prompt": "x", "size": "1216x1216", "steps": 1}).status_code == 200
    refused(post(api, {"prompt": "x", "size": "1248x1248", "steps": 1}), 400, "1248x1248 needs")


def test_what_would_take_longer_than_a_request_may_is_refused_before_it_waits(
    resolved: ResolvedPlan, asleep: Asleep
) -> None:
    with running(resolved, *asleep(1), timeout=30.0) as api:
        refused(
            post(api, {"prompt": "x", "n": 4}), 400, "4 pictures of 1024x1024 in 20 steps take some 38 s by the plan's"
        )
        assert post(api, {"prompt": "x", "n": 2}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "files", "says"),
    [
        ({"prompt": "x"}, [], "one file image is needed, 0 were sent"),
        ({"prompt": "x"}, [("image", b"a"), ("image[]", b"b")], "one file image is needed, 2 were sent"),
        ({"prompt": "x"}, [("mask", b"a")], "a file 'mask' is not taken; send image"),
        ({"prompt": "x", "image": "a"}, [], "one file image is needed|image must be a file"),
        ({"prompt": "x", "n": "many"}, [("image", png())], "n: must be a valid integer"),
        ({"prompt": "x", "control_image": text(png())}, [("image", png())], "are both given"),
        ({}, [("image", png())], "prompt must be given"),
    ],
)
def test_a_form_that_is_not_right_is_named(api: Running, fields: Any, files: Any, says: str) -> None:
    parts: list[Any] = [(key, ("a.png", content, "image/png")) for key, content in files] or [("prompt2", (None, "x"))]
    parts += [(key, (None, value)) for key, value in fields.items()]
    answer = post(api, path="/v1/images/edits", files=parts)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert any(one in message for one in says.split("|")), message


def test_a_form_takes_numbers_as_text(api: Running) -> None:
    fields = {
        "prompt": "x",
        "n": "2",
        "steps": "1",
        "seed": "9",
        "guidance_scale": "1.5",
        "size": SIZE,
        "stream": "false",
    }
    answer = post(api, path="/v1/images/edits", data=fields, files={"image[]": ("a.png", png(), "image/png")})
    assert answer.json()["sana_deploy"]["seeds"] == [9, 10]


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [("GET", "/nothing", 404, "there is nothing at '/nothing'"), ("GET", PATH, 405, "GET is not for this path"),
     ("POST", "/v1/models", 405, "POST is not for this path"), ("GET", "/docs", 404, "nothing at")],
)  # fmt: skip
def test_paths_and_methods_that_are_not_there_are_answered_in_the_same_shape(
    api: Running, method: str, path: str, status: int, says: str
) -> None:
    refused(httpx2.request(method, f"{api.url}{path}"), status, says)


@pytest.mark.parametrize(
    ("path", "kind"), [(PATH, "text/plain"), (PATH, "multipart/form-data"), ("/v1/images/edits", "application/json")]
)
def test_a_body_of_another_kind_is_refused_so_that_no_page_can_send_one_unasked(
    api: Running, path: str, kind: str
) -> None:
    answer = post(api, path=path, content=b'{"prompt": "x"}', headers={"Content-Type": kind})
    refused(answer, 415, "the body must be", "wrong_content_type")


# Failures


@pytest.mark.parametrize(
    ("prompt", "code", "says"),
    [("poison", "bad_picture", "the transformer gave NaN"), ("too large", "out_of_memory", "in vae during decode"),
     ("defect", "internal_error", "the service's log has it under request mine-1")],
)  # fmt: skip
def test_a_failure_is_told_without_what_is_inside(api: Running, prompt: str, code: str, says: str) -> None:
    answer = post(api, {"prompt": prompt, "size": SIZE}, headers={"X-Request-Id": "mine-1"})
    assert refused(answer, 500, says, code)["type"] == "server_error"
    assert answer.headers["x-request-id"] == "mine-1"
    assert "secret.py" not in answer.text
    assert "Traceback" not in answer.text
    assert post(api, {"prompt": "x", "size": SIZE, "steps": 1}).status_code == 200


def test_a_defect_of_the_application_itself_is_told_in_the_same_shape(
    api: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("/home/somebody/secret.py")

    monkeypatch.setattr(api.service.orders, "place", broken)
    answer = post(api, {"prompt": "x"})
    refused(answer, 500, "an unexpected failure; the service's log has it under request", "internal_error")
    assert "secret" not in answer.text


def test_a_full_queue_is_429_with_seconds_and_every_accepted_request_is_answered(
    resolved: ResolvedPlan, asleep: Asleep
) -> None:
    with running(resolved, *asleep(1), queue=4, most_images=4) as api:
        body = {"prompt": "x", "size": SIZE, "steps": 60}  # long enough for all to come meanwhile
        with ThreadPoolExecutor(12) as pool:  # no more than may be received at once
            answers = list(pool.map(lambda _: post(api, body), range(12)))
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 429}
        assert codes.count(200) >= 4
        for answer in answers:
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                refused(answer, 429, "of 4 places in the queue are taken", "queue_full")
        assert api.metric(f'sana_requests_total{{code="429",route="{PATH}"}}') == codes.count(429)
        assert api.metric("sana_images_total") == codes.count(200)


def test_a_client_that_leaves_frees_its_place_and_is_counted(resolved: ResolvedPlan, asleep: Asleep) -> None:
    with running(resolved, *asleep(1), max_body="1MiB", most_steps=1000) as api:
        for stream in (False, True):
            body = json.dumps({"prompt": "x", "size": SIZE, "steps": 900, "stream": stream}).encode()
            head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            with closing(socket.create_connection(api.address)) as connection:
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                until(lambda: api.engine.standing.working == 1)
            until(lambda: api.engine.standing.working == 0)
        assert api.metric("sana_cancelled_total") == 2
        until(lambda: api.metric(f'sana_requests_total{{code="499",route="{PATH}"}}') >= 1)
        assert post(api, {"prompt": "x", "size": SIZE, "steps": 1}).status_code == 200


def test_a_late_request_is_504(resolved: ResolvedPlan, asleep: Asleep) -> None:
    with running(resolved, *asleep(1), timeout=2.0) as api:
        refused(
            post(api, {"prompt": "slow", "size": "32x32", "steps": 19}),
            504,
            "0 of 1 pictures were done within 2 s",
            "timeout",
        )


def test_a_service_that_is_stopping_refuses_and_says_so(resolved: ResolvedPlan, asleep: Asleep) -> None:
    with running(resolved, *asleep(1)) as api:
        api.engine._draining = True
        answer = post(api, {"prompt": "x"})
        assert refused(answer, 503, "is stopping and takes no more requests", "not_serving")
        assert answer.headers["retry-after"] == "5"
        ready = httpx2.get(f"{api.url}/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "stopping")


def until(done: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


# Who may ask, and how much


def test_keys_are_asked_for_everywhere_but_where_nothing_is_told(resolved: ResolvedPlan, asleep: Asleep) -> None:
    with running(resolved, *asleep(1), keys=("first", "sécond")) as api:
        for path in ("/", "/health", "/ready"):
            assert httpx2.get(f"{api.url}{path}").status_code == 200
        for path in ("/v1/models", "/metrics", "/plan", "/openapi.json", "/nothing"):
            answer = httpx2.get(f"{api.url}{path}")
            assert refused(answer, 401, "a valid key is needed", "invalid_api_key")["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
        for given in ("Bearer fir", "Bearer first2", "Basic first", "first", "Bearer", "Bearer \xff"):
            assert httpx2.get(f"{api.url}/plan", headers={b"Authorization": given.encode("latin-1")}).status_code == 401
        assert httpx2.get(f"{api.url}/plan", headers={"Authorization": "bearer first"}).status_code == 200
        client = openai.OpenAI(base_url=f"{api.url}/v1", api_key="first")
        assert client.images.generate(prompt="x", size=SIZE, extra_body={"steps": 1}).data
        wrong = openai.OpenAI(base_url=f"{api.url}/v1", api_key="third")
        with pytest.raises(openai.AuthenticationError):
            wrong.images.generate(prompt="x")


def test_pages_of_others_and_names_pointed_here_are_refused(api: Running) -> None:
    host = api.url.removeprefix("http://")
    for given in ("evil.example", f"evil.example:{host.rpartition(':')[2]}", "127.0.0.1.evil.example", ""):
        refused(httpx2.get(f"{api.url}/plan", headers={"Host": given}), 421, "answers this machine only")
    for given in ("localhost", host, "[::1]:8000"):
        assert httpx2.get(f"{api.url}/plan", headers={"Host": given}).status_code == 200
    for origin in ("https://evil.example", "null", "http://localhost:1"):
        refused(httpx2.get(f"{api.url}/plan", headers={"Origin": origin}), 403, "may not use this service")
    assert httpx2.get(f"{api.url}/plan", headers={"Origin": api.url}).status_code == 200


def test_a_request_id_of_a_client_is_kept_only_where_it_is_plain(api: Running) -> None:
    for given, kept in (("abc-1.2_3", True), ("a\tb", False), ("x" * 65, False)):
        answer = httpx2.get(f"{api.url}/health", headers={"X-Request-Id": given})
        assert (answer.headers["x-request-id"] == given) is kept


def exchange(api: Running, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send parts over a connection of its own; what comes until it is closed."""
    with closing(socket.create_connection(api.address)) as connection:
        connection.settimeout(10)
        received = b""
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while chunk := connection.recv(65536):
                received += chunk
        except OSError:
            pass
        return received


HEAD = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()


@pytest.mark.parametrize(
    "parts",
    [
        (HEAD + b"Content-Length: 300000\r\n\r\n", b"x"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"8000\r\n" + b"x" * 0x8000 + b"\r\n"] * 9),
    ],
    ids=["said", "found"],
)
def test_a_body_that_is_too_large_is_413_and_ends_the_connection(api: Running, parts: tuple[bytes, ...]) -> None:
    received = exchange(api, *parts)
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"larger than the 262144 bytes" in received
    assert b"connection: close" in received.lower()


def test_a_body_that_does_not_come_is_408(api: Running) -> None:
    since = time.monotonic()
    received = exchange(api, HEAD + b"Content-Length: 100\r\n\r\n", b"{")
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive within 1 s" in received
    assert time.monotonic() - since < 5


@pytest.mark.parametrize("parts", [(b"",), (b"GET /health HTT",), tuple(bytes([one]) for one in b"GET /he" * 3)])
def test_a_head_that_does_not_come_ends_the_connection(api: Running, parts: tuple[bytes, ...]) -> None:
    since = time.monotonic()
    assert exchange(api, *parts, pause=0.1) == b""
    assert 0.9 < time.monotonic() - since < 5


def test_a_head_that_is_too_large_or_no_http_is_400(api: Running) -> None:
    for sent in (b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", b"\x16\x03\x01 nonsense\r\n\r\n"):
        assert exchange(api, sent)[:12] in (b"HTTP/1.1 400", b"")
    assert httpx2.get(f"{api.url}/health").status_code == 200


def test_a_bomb_is_refused_before_it_is_unpacked(api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpacked(*_: Any) -> None:
        raise AssertionError("it was unpacked")

    buffer = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 50_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", unpacked)
    refused(post(api, {"prompt": "x", "control_image": text(buffer.getvalue())}), 400, "144,000,000 pixels, more than")


def test_only_so_many_bodies_arrive_at_a_time(resolved: ResolvedPlan, asleep: Asleep) -> None:
    with running(resolved, *asleep(1), queue=1, most_images=1, receive_timeout=5.0) as api:
        waiting = [socket.create_connection(api.address) for _ in range(9)]
        for connection in waiting:
            connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n")
        until(lambda: api.service.uploads == 9)
        refused(post(api, {"prompt": "x"}), 429, "9 requests are being received already")
        for connection in waiting:
            connection.close()
        until(lambda: api.service.uploads == 0)
        assert post(api, {"prompt": "x", "size": SIZE, "steps": 1}).status_code == 200


# Metrics


def test_metrics_count_what_happened(resolved: ResolvedPlan, asleep: Asleep) -> None:
    with running(resolved, *asleep(1), batch=2) as api:
        for prompt in ("x", "poison"):
            post(api, {"prompt": prompt, "size": SIZE, "steps": 2, "n": 2})
        text_ = httpx2.get(f"{api.url}/metrics").text
        assert f'sana_requests_total{{code="500",route="{PATH}"}} 1.0' in text_
        for line, value in {
            "sana_images_total": 2, "sana_batch_size_count": 3, "sana_batch_size_sum": 5, "sana_retried_total": 2,
            "sana_queue_seconds_count": 5, 'sana_phase_seconds_count{phase="denoise"}': 1, "sana_queue_length": 0,
            "sana_replicas_ready": 1, 'sana_gpu_peak_bytes{device="vgpu:1"}': 123,
            f'sana_request_seconds_count{{route="{PATH}"}}': 2,
        }.items():  # fmt: skip
            assert api.metric(line) == value, line
        slot = resolved.plan.slots[1]
        planned = slot.weights_bytes + slot.activation_bytes
        assert api.metric('sana_gpu_planned_bytes{device="vgpu:1"}') == planned


def test_the_dashboard_shows_every_metric_and_none_that_is_not_there(api: Running) -> None:
    dashboard = json.loads((CHECKOUT / "docs" / "grafana.json").read_text(encoding="utf-8"))
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    shown = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in re.findall(r"\bsana_\w+", asked)}
    told = {family.name for family in api.service.metrics.registry.collect()}
    assert shown == told
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_requests_side_by_side_get_their_own_pictures(api: Running) -> None:
    seeds, found = range(40), dict[int, int]()
    lock = threading.Lock()

    def ask(seed: int) -> None:
        answer = post(api, {"prompt": f"fox {seed}", "size": SIZE, "steps": 1, "seed": seed}).json()
        with lock:
            found[seed] = picture(answer["data"][0]["b64_json"]).getpixel((0, 0))[0]

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(ask, seeds))
    assert found == {seed: seed for seed in seeds}
