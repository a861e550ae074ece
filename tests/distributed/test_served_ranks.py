"""``internvl3 serve`` on two ranks: several requests at once, and one whose client leaves."""

import base64
import http.client
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
from fixtures.loaded_models import tiny
from fixtures.rank_checks import IMAGES
from fixtures.rank_processes import INTERNVL3, PATIENCE_S, finish, free_ports, rank_processes
from fixtures.tiny import Recipe

from internvl3_mlx import load


def body(question, image=None, **options):
    parts = [{"type": "text", "text": question}]
    if image is not None:
        file = BytesIO()
        image.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    messages = [{"role": "user", "content": parts}]
    return json.dumps({"model": "m", "messages": messages, **options})


class Client:
    """Asks the server of a port."""

    def __init__(self, port):
        self.port = port

    def connect(self, method, path, content=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def wait_until_ready(self, process):
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            try:
                connection, response = self.connect("GET", "/health")
            except OSError:
                time.sleep(0.2)
                continue
            ready = response.status == 200
            connection.close()
            if ready:
                return
            time.sleep(0.2)
        raise AssertionError("the server does not begin to answer")

    def ask(self, content):
        connection, response = self.connect("POST", "/v1/chat/completions", content)
        answer = json.loads(response.read())
        connection.close()
        return answer["choices"][0]["message"]["content"]

    def leave(self, content):
        """Ask, and close the connection after the first words."""
        connection, response = self.connect("POST", "/v1/chat/completions", content)
        assert response.read(40)
        response.close()
        connection.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder, [port] = tmp_path_factory.mktemp("served"), free_ports(1)
    command = [*INTERNVL3, "serve", "--model", str(tiny(Recipe()).folder), "--port", str(port)]
    with rank_processes(folder, [command, command]) as processes:
        client = Client(port)
        client.wait_until_ready(processes[0])
        questions = [
            body("What?", IMAGES[0], max_tokens=9, temperature=0),
            body("Who is it?", IMAGES[1], max_tokens=14, temperature=0),
        ]
        with ThreadPoolExecutor(2) as threads:
            answers = [*threads.map(client.ask, questions)]
        client.leave(body("Why?", max_tokens=100_000, temperature=2, stream=True))
        sampled = body("Where?", max_tokens=9, temperature=1.2, seed=5, logit_bias={"40": -9})
        answers += [client.ask(questions[0]), client.ask(sampled), client.ask(sampled)]
        alive = [process.poll() for process in processes]
        processes[0].send_signal(signal.SIGTERM)
        ends = [finish(process) for process in processes]
    return answers, alive, ends


def test_two_requests_at_once_get_what_one_process_answers(served):
    answers, alive, ends = served
    vlm = load(str(tiny(Recipe()).folder))
    first = vlm.ask("What?", IMAGES[:1], max_tokens=9).text
    second = vlm.ask("Who is it?", IMAGES[1:], max_tokens=14).text
    assert answers[:3] == [first, second, first], ends
    assert answers[3] == answers[4]
    assert alive == [None, None]


def test_the_server_ends_in_order_on_both_ranks(served):
    ends = served[2]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert ends[1][1:] == ("", "")
