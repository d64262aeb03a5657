"""A server that answers as `vllm serve` does to the trainer, with the engine "hf" behind it.

    python -m tests.faults.server MODEL PORT FOLDER

It samples from weights that it was sent, by seed, so a run with it is repeatable bit for bit and
needs no vLLM. It does as a note in the folder says, once.
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_fast.records import Prompt, Sampling, SpecialTokens
from laser_fast.rollout.hf import HfEngine
from laser_fast.rollout.score_request import EOS_TOKEN_IDS, SCORE_TOKEN_ID

from .graders import take_note

torch.set_num_threads(1)


class Served:
    """The model, and the version of its weights; one request at a time."""

    def __init__(self, path):
        self.lock = threading.Lock()
        self.start(path)

    def start(self, path):
        """With the weights of the folder, as any server starts."""
        self.path, self.version = path, "default"
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.vocab_size, self.pad = len(tokenizer), tokenizer.pad_token_id
        self.eos = tokenizer.eos_token_id

    def reload_weights(self, folder):
        with self.lock:
            for file in sorted(Path(folder).glob("*.safetensors")):
                self.model.load_state_dict(load_file(file), strict=False)

    @torch.no_grad()
    def read(self, ids):
        """Log-probs of given ids, as `prompt_logprobs` has them."""
        with self.lock:
            rows = self.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        found = [
            None,
            *({str(i): {"logprob": row[i].item()}} for i, row in zip(ids[1:], rows, strict=True)),
        ]
        return [{"prompt_logprobs": found}]

    def sample(self, asked):
        """Completions, each with the score token behind its EOS where that is forced."""
        own = asked["vllm_xargs"]
        is_forced = bool(own[EOS_TOKEN_IDS])
        tokens = SpecialTokens(
            score_token_id=own[SCORE_TOKEN_ID],
            eos_token_ids=(self.eos,),
            pad_token_id=self.pad,
            vocab_size=self.vocab_size,
        )
        engine = HfEngine(self.model, tokens, max_num_seqs=64)
        prompt = Prompt(prompt_id="", text="", prompt_ids=tuple(asked["prompt"]), answer="")
        sampling = Sampling(
            group_size=asked.get("n", 1),
            temperature=1.0,
            max_new_tokens=asked["max_tokens"] - is_forced,
            seed=asked.get("seed", 0),
            score_at="eos" if is_forced else None,
        )
        with self.lock:
            [group] = engine.generate([prompt], sampling)
        choices = []
        for index, drawn in enumerate(group.completions):
            ids, logprobs = list(drawn.completion_ids), list(drawn.rollout_logprobs)
            if drawn.score_logprob is not None:
                ids.append(tokens.score_token_id)
                logprobs.append(drawn.score_logprob)
            found = {"token_logprobs": logprobs}
            choices.append({"index": index, "token_ids": ids, "logprobs": found})
        return choices

    def probe(self, asked):
        """The trainer's first question: is the score token forced, and its log-prob a raw one."""
        score, eos = asked["vllm_xargs"][SCORE_TOKEN_ID], self.eos
        logprobs = [-1.0, -9.0]
        return [{"index": 0, "token_ids": [eos, score], "logprobs": {"token_logprobs": logprobs}}]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        served = self.server.served
        pages = {
            "/version": {"version": "0.32.0+cpu"},
            "/v1/models": {"data": [{"id": "small", "max_model_len": 64}]},
            "/weight_info": {"weight_version": served.version},
        }
        self.answer(pages[self.path])

    def do_POST(self):
        served = self.server.served
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/collective_rpc":
            if take_note(self.server.folder / "reload"):
                asked["kwargs"]["weights_path"] = served.path  # what arrives is lost
            served.reload_weights(asked["kwargs"]["weights_path"])
        elif self.path == "/update_weight_version":
            served.version = asked["new_version"]
        elif self.path == "/v1/completions":
            choices = self.complete(asked)
            if choices is not None:
                self.answer({"choices": choices})
            return
        self.answer({"success": True})

    def complete(self, asked):
        served = self.server.served
        if "allowed_token_ids" in asked:
            return served.probe(asked)
        if "prompt_logprobs" in asked:
            return served.read(asked["prompt"])
        choices = served.sample(asked)
        return FAULTS[take_note(self.server.folder / "server")](choices, served)

    def answer(self, page):
        body = json.dumps(page).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port, served, folder):
        super().__init__(("127.0.0.1", port), Handler)
        self.served, self.folder = served, folder


def be_well(choices, served):
    return choices


def die(choices, served):
    os.kill(os.getpid(), signal.SIGKILL)


def forget(choices, served):
    """Gone and back within the pause before the next attempt, with the weights that it has."""
    served.start(served.path)


def be_late(choices, served):
    time.sleep(15.0)
    return choices


def say_nothing(choices, served):
    time.sleep(3600.0)


def leave_one_out(choices, served):
    return choices[1:]


def cut_off(choices, served):
    for choice in choices:
        del choice["token_ids"][1:]
    return choices


def go_on(choices, served):
    """Tokens behind the end, and beyond what was asked for."""
    for choice in choices:
        choice["token_ids"] += [5] * 100
        choice["logprobs"]["token_logprobs"] += [-0.5] * 100
    return choices


FAULTS = {
    None: be_well,
    "die": die,
    "forget": forget,
    "be late": be_late,
    "say nothing": say_nothing,
    "leave one out": leave_one_out,
    "cut off": cut_off,
    "go on": go_on,
}

if __name__ == "__main__":
    path, port, folder = sys.argv[1:]
    Server(int(port), Served(path), Path(folder)).serve_forever()
