"""Run by test_vllm_pages.py in a process of its own: the page's code for vLLM in process.

Engines of one process share vLLM's process groups, which go with the first that ends.
"""

import functools
import json
import sys

import vllm


def main(code, names, engine_args):
    vllm.LLM = functools.partial(vllm.LLM, **engine_args)
    generate = vllm.LLM.func.generate
    outputs = []
    vllm.LLM.func.generate = lambda *x: outputs.extend(generate(*x)) or outputs
    exec(code, names)

    # What the text below the code says of the position "last", on an engine without need of it.
    token_id = names["score_token_id"]
    params = vllm.SamplingParams(
        max_tokens=40, logprob_token_ids=[token_id], logit_bias={token_id: -100}
    )
    last = generate(names["llm"], names["prompts"], params)
    beside = [
        names["beta"] * (o.outputs[0].logprobs[-1][token_id].logprob - names["ref_logprob"])
        for o in last
        if o.outputs[0].finish_reason == "stop"
    ]
    print(
        json.dumps(
            [
                {"scores": names["scores"], "answers": finished(outputs)},
                {"scores": beside, "answers": finished(last)},
            ]
        )
    )


def finished(outputs):
    return [
        (list(o.prompt_token_ids), list(o.outputs[0].token_ids))
        for o in outputs
        if o.outputs[0].finish_reason == "stop"
    ]


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
