"""The client of an OpenAI-compatible endpoint, against a server on this machine."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from vogue.benchmarks import BENCHMARKS, EndpointError, Extractor, Problem
from vogue.benchmarks.answers import ask_extractor, read_answers
from vogue.benchmarks.extract import NUMERIC, options
from vogue.data import Sample
from vogue.rollout.engine import Completion

OPTIONS = options({"A": "4", "B": "5"})


def reply(content):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


@pytest.fixture
def serve():
    """A function: start a server that answers with `answer(question, number)` -> (status, body); returns it.

    It keeps the requests it got as (path, headers, body).
    """
    servers = []

    def start(answer):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.server.got.append((self.path, dict(self.headers), body))
                status, text = answer(body["messages"][0]["content"], len(self.server.got))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.got = []
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_model_is_asked_with_question_completion_and_form(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(lambda *_: (200, reply(" The answer is (B). ")))
    assert Extractor(server.url + "/", "some-72B").extract("How many?", "five, I think", OPTIONS) == "B"
    ((path, headers, body),) = server.got
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("some-72B", 0)
    (message,) = body["messages"]
    assert message["role"] == "user"
    for part in ("the letter of the chosen option, one of A, B", "How many?", "five, I think"):
        assert part in message["content"]


def test_without_a_key_none_is_sent(serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = serve(lambda *_: (200, reply("4")))
    Extractor(server.url, "m").check()
    assert "Authorization" not in server.got[0][1]


@pytest.mark.parametrize("said", ["none", "None.", "", "no number here"])
def test_a_reply_without_an_answer_is_none(serve, said):
    assert Extractor(serve(lambda *_: (200, reply(said))).url, "m").extract("?", "?", NUMERIC) is None


def test_what_may_pass_is_tried_again(serve):
    server = serve(lambda _, number: (503, "loading") if number < 3 else (200, reply("7")))
    assert Extractor(server.url, "m", pauses=(0.01, 0.01)).extract("?", "?", NUMERIC) == "7"
    assert len(server.got) == 3


def test_what_does_not_pass_is_an_error_that_names_the_endpoint(serve):
    server = serve(lambda *_: (503, "loading still"))
    with pytest.raises(EndpointError, match=rf"{server.url}: 503 .*: loading still"):
        Extractor(server.url, "m", pauses=(0.01, 0.01)).extract("?", "?", NUMERIC)
    assert len(server.got) == 3


def test_a_refusal_is_not_tried_again(serve):
    server = serve(lambda *_: (404, "no model 'm'"))
    with pytest.raises(EndpointError, match=r"404 Not Found: no model 'm'"):
        Extractor(server.url, "m").check()
    assert len(server.got) == 1


def test_an_endpoint_that_answers_too_late_is_an_error(serve):
    server = serve(lambda *_: (time.sleep(1), (200, reply("4")))[1])
    with pytest.raises(EndpointError, match="timed out"):
        Extractor(server.url, "m", timeout=0.1, pauses=()).check()


def test_an_endpoint_that_is_not_there_is_an_error():
    with pytest.raises(EndpointError, match=r"http://127.0.0.1:9/v1: .*refused"):
        Extractor("http://127.0.0.1:9/v1", "m", pauses=()).check()  # the port of a service that nobody runs
    with pytest.raises(EndpointError, match=r"file:///etc: an endpoint is http://HOST:PORT/v1"):
        Extractor("file:///etc", "m")


@pytest.mark.parametrize("body", ["<html>", "[]", '{"choices": []}', '{"error": "x"}'])
def test_what_is_no_chat_completion_is_an_error_that_shows_it(serve, body):
    with pytest.raises(EndpointError, match="not the reply of a chat completion"):
        Extractor(serve(lambda *_: (200, body)).url, "m").check()


def test_answers_come_in_the_order_of_the_questions_however_long_each_takes(serve):
    def answer(question, _):
        number = int(question.split("item ")[1].split(".")[0])
        time.sleep(0.1 if number == 0 else 0)
        return 200, reply(str(number))

    asked = [(f"item {number}.", "?", NUMERIC) for number in range(40)]
    found = Extractor(serve(answer).url, "m").extract_all(asked)
    assert list(found) == [str(number) for number in range(40)]


def answered(*completions):
    row = {"query": "How many?", "label": "5", "image": None}
    problem = Problem(Sample("How many?", "5", ()), row)
    return read_answers(BENCHMARKS["chartqa"], problem, [Completion((1,), (0.0,), text, True) for text in completions])


def test_only_what_the_rules_leave_unread_is_asked_unless_everything_is(serve):
    server = serve(lambda *_: (200, reply("5")))
    items = [answered("\\boxed{4}", "five"), answered("five, say", "\\boxed{5}")]
    assert [item.right for item in items] == [(False, False), (False, True)]
    common = (BENCHMARKS["chartqa"], items, Extractor(server.url, "m"))
    rest = ask_extractor(*common, False, Console(quiet=True))
    parsed = [[(answer.parsed, answer.parsed_by) for answer in item.answers] for item in rest]
    assert parsed == [[("4", "rules"), ("5", "extractor")], [("5", "extractor"), ("5", "rules")]]
    assert [item.right for item in rest] == [(False, True), (True, True)]
    assert len(server.got) == 2
    everything = ask_extractor(*common, True, Console(quiet=True))
    assert [item.right for item in everything] == [(True, True), (True, True)]
    assert len(server.got) == 6
