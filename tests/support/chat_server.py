"""An HTTP server that answers like an OpenAI-compatible endpoint, or with given replies."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from vlm_fast.training.data.generation.prompts import EXAMPLE_ANSWERS, WANTED


def completion(text, finish_reason="stop"):
    """The body of a chat completion."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def good(request):
    """A valid answer of the kind that a request asks for, from prompts.py."""
    system = request["messages"][0]["content"]
    return completion(next(EXAMPLE_ANSWERS[k] for k, words in WANTED.items() if words in system))


class ChatServer:
    """``requests`` are bodies that came, ``keys`` their Authorization headers.

    ``replies`` are given in turn, then ``good`` ones: a body, or ``(status, headers, body)``.
    A body is a dictionary, bytes as they are, or a function of the request.
    """

    def __init__(self):
        self.requests, self.keys, self.replies = [], [], []

    def reply(self, request, key):
        self.requests.append(request)
        self.keys.append(key)
        reply = self.replies.pop(0) if self.replies else good
        status, headers, body = reply if isinstance(reply, tuple) else (200, {}, reply)
        body = body(request) if callable(body) else body
        return status, headers, body if isinstance(body, bytes) else json.dumps(body).encode()


@contextmanager
def serving():
    server = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers, body = server.reply(request, self.headers["Authorization"])
            self.send_response(status)
            headers = {"Content-Type": "application/json", "Content-Length": len(body), **headers}
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server.url = f"http://127.0.0.1:{http.server_port}/v1"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
