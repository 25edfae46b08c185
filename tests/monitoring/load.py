"""Traffic that moves every series: answers, streams, folds, snapshots, refusals, mistakes."""

import hashlib
import http.client
import json
import threading

# The other one's limit is used up by its first request.
KEY, LIMITED_KEY = "sk-monitoring", "sk-limited"
# More than may run and wait together, so that some are refused.
BURST = 12
MAX_RUNNING, MAX_WAITING = 3, 3
# Prompts above this many tokens fold.
SLOTS = 128

FLAGS = [
    "--cache-slots", str(SLOTS), "--max-running", str(MAX_RUNNING), "--max-waiting", str(MAX_WAITING),
    "--memory-budget", "1GiB", "--served-model-name", "smollm2",
]


def key_file():
    """The text of a key file with both keys."""
    digest = lambda key: hashlib.sha256(key.encode()).hexdigest()
    return (
        f'[[key]]\nname = "monitoring"\nsha256 = "{digest(KEY)}"\n'
        f'[[key]]\nname = "limited"\nsha256 = "{digest(LIMITED_KEY)}"\nrequests-per-minute = 1\n'
    )


class Load:
    """A thread that sends rounds of requests until it is told to stop."""

    def __init__(self, host, port):
        self.host, self.port = host, port
        self.rounds = 0
        self.statuses = {}
        self.failure = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _run(self):
        try:
            while not self._stop.is_set():
                self._round()
                self.rounds += 1
        except Exception as failure:
            # The server is killed while this runs, on purpose; before that, it is told.
            self.failure = failure

    def _round(self):
        self._conversation()
        long = "Tell me of the river. " * 60
        self._chat([{"role": "user", "content": long + str(self.rounds)}], max_tokens=8)
        self._chat("one word", max_tokens=20, stop=["e"])
        self._chat("pick", max_tokens=4, structured_outputs={"choice": ["yes", "no"]})
        self._chat("a story", max_tokens=12, n=2)
        self._leave_early()
        self._mistakes()
        self._post("/v1/chat/completions", self._body("hello", max_tokens=1), key=LIMITED_KEY)
        burst = [threading.Thread(target=self._chat, args=("count",), kwargs={"max_tokens": 24}) for _ in range(BURST)]
        for thread in burst:
            thread.start()
        for thread in burst:
            thread.join()

    def _conversation(self):
        """The second turn sends the first answer back."""
        messages = [{"role": "user", "content": f"Say something about bees. {self.rounds}"}]
        answer = self._chat(messages, max_tokens=12)
        if answer and answer.get("choices"):
            text = answer["choices"][0]["message"]["content"]
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And ants?"}]
            self._chat(messages, max_tokens=12)

    def _mistakes(self):
        self._post("/v1/chat/completions", "{", key=KEY)
        self._post("/v1/chat/completions", self._body("x", model="other"), key=KEY)
        too_long = {"prompt": "x " * 400, "max_tokens": 1, "locket": {"require_exact": True}}
        self._post("/v1/completions", too_long, key=KEY)
        self._post("/v1/chat/completions", self._body("x"), key="sk-wrong")

    def _leave_early(self):
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        body = json.dumps(self._body("a long story", max_tokens=400, stream=True, ignore_eos=True))
        connection.request("POST", "/v1/chat/completions", body, self._headers(KEY))
        connection.getresponse().read(64)
        connection.close()

    def _body(self, content, **fields):
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        return {"messages": messages, "temperature": 0, **fields}

    def _chat(self, content, **fields):
        body = self._body(content, ignore_eos="stop" not in fields, **fields)
        return self._post("/v1/chat/completions", body, key=KEY)

    def _headers(self, key):
        return {"content-type": "application/json", "authorization": f"Bearer {key}"}

    def _post(self, path, body, key):
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            text = body if isinstance(body, str) else json.dumps(body)
            connection.request("POST", path, text, self._headers(key))
            response = connection.getresponse()
            answer = json.loads(response.read())
            self.statuses[response.status] = self.statuses.get(response.status, 0) + 1
            return answer
        finally:
            connection.close()
