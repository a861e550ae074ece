"""Requests as real clients sent them: each gets an answer or a plain refusal, and quickly."""

import json
from pathlib import Path

import fixtures.http_calls
import pytest
from fixtures.fake_engine import FakeEngine
from fixtures.http_calls import call
from fixtures.servers import running_server

RECORDED = json.loads(
    (Path(fixtures.http_calls.__file__).parent / "client_requests.json").read_text("utf-8")
)
REFUSED = {"openai chat tools": "tools is not supported"}
WITHOUT_NETWORK = ("anthropic stream helper",)  # names an image on the web


@pytest.fixture(scope="module")
def server():
    with running_server(FakeEngine()) as running:
        yield running


@pytest.mark.parametrize(
    "recorded", RECORDED, ids=[f"{n}-{one['case']}" for n, one in enumerate(RECORDED)]
)
def test_a_recorded_request_is_served(server, recorded):
    answer = call(
        server, recorded["method"], recorded["path"], recorded["body"], recorded["headers"]
    )
    refusal = REFUSED.get(recorded["case"])
    if refusal is not None:
        assert answer.status == 400
        assert refusal in answer.message
    elif recorded["case"] in WITHOUT_NETWORK:
        assert answer.status == 400
        assert "cannot download https://example.org/a.png" in answer.message
    else:
        assert answer.status == 200
        assert answer.body
