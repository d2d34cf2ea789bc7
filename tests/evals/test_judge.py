"""A language model as judge: scores are parsed, requested again if missing; only the endpoint gets the key."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from camopd_jax.config.schema import Judge
from camopd_jax.errors import UserError
from camopd_jax.evals.graders import judge

KEY = "sk-a-very-secret-key"
ROW = {"messages": [{"role": "system", "content": "You are Ahab."}, {"role": "user", "content": "Where is the whale?"}]}


@pytest.fixture
def endpoint():
    """A server that answers chat completions with the texts in `replies` and stores the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, self.headers["Authorization"], body))
            status, text = server.replies.pop(0)
            message = {"role": "assistant", "content": text}
            reply = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            }
            data = json.dumps(reply if status == 200 else {"error": {"message": "denied"}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.replies = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def task(endpoint, monkeypatch):
    monkeypatch.setenv(judge.KEY, KEY)
    return judge.roleplay(Judge(f"http://127.0.0.1:{endpoint.server_port}/v1", "marker"))


def test_a_score_from_one_to_ten(task, endpoint):
    task.check()
    endpoint.replies = [(200, "Vivid.\nScore: 10"), (200, "Flat. **Score:** 1"), (200, "Score: 3? No.\nScore: 4")]
    assert [task.grade("Thar she blows", ROW).value for _ in range(3)] == [1.0, 0.0, pytest.approx(1 / 3)]
    endpoint.replies = [(200, "Score\uff1a\uff11\uff10")]  # full-width
    assert task.grade("Thar she blows", ROW).value == 1
    path, key, body = endpoint.requests[0]
    assert path == "/v1/chat/completions" and key == f"Bearer {KEY}" and body["model"] == "marker"
    case = body["messages"][0]["content"]
    assert all(part in case for part in ("You are Ahab.", "Where is the whale?", "Thar she blows", "Score: N"))
    assert body["temperature"] == 0


def test_a_reply_without_score_is_requested_again(task, endpoint):
    endpoint.replies = [(200, "Lovely."), (200, "Score: 11"), (200, "Score: 7")]
    assert task.grade("x", ROW).value == pytest.approx(6 / 9)
    endpoint.replies = [(200, "Score: 7.5")] * 3
    grade = task.grade("x", ROW)
    assert (grade.value, grade.marked) == (0, False) and len(endpoint.requests) == 6


def test_the_key_is_never_printed(task, endpoint, capfd, caplog):
    endpoint.replies = [(401, "")]
    with caplog.at_level("DEBUG"), pytest.raises(UserError, match="does not answer .*Answers are kept") as error:
        task.grade("x", ROW)
    told = capfd.readouterr()
    assert KEY not in str(error.value) + told.out + told.err + caplog.text


def test_errors_for_missing_judge_settings(monkeypatch):
    monkeypatch.delenv(judge.KEY, raising=False)
    with pytest.raises(UserError, match="needs its endpoint and model|need its endpoint and model"):
        judge.check(Judge("http://127.0.0.1/v1", ""))
    with pytest.raises(UserError, match="set OPENAI_API_KEY in the environment"):
        judge.check(Judge("http://127.0.0.1/v1", "m"))
