#!/usr/bin/env bash
# Check and measure everything on one NVIDIA GPU, in under ten minutes:
#
#     bench/gpu_check.sh OUT
#
# Needs PyTorch >= 2.11 with Triton, pytest and this checkout; installs nothing, fetches nothing, and
# skips by name what is missing. The most valuable steps come first. Every step has its own time
# limit and leaves OUT/<step>.json, .md and .log, also when it fails; a table of all targets ends the
# run. PYTHON names the interpreter; a copy without .git can name its commit in LASER_FAST_COMMIT.
set -u
[ $# -eq 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/kernels PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu_check.sh: expected a PyTorch that sees an NVIDIA GPU; $python has none" >&2
    exit 1
}
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-570}))

# A build that its limit ends leaves a lock for which every later one would wait.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$(mktemp -d)}

# step NAME LIMIT ARGUMENTS...: run `python ARGUMENTS --json OUT/NAME.json` for at most LIMIT seconds.
step() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) begin=$SECONDS code=no-time
    shift 2
    rm -f "$TORCH_EXTENSIONS_DIR"/*/lock
    if [ $left -gt 5 ]; then
        timeout -k 5 $((limit < left ? limit : left)) \
            "$python" "$@" --json "$out/$name.json" >"$out/$name.log" 2>&1
        code=$?
    fi
    if [ ! -s "$out/$name.json" ]; then
        printf '{"header": {"op": "%s", "device": "none", "case": "exit code %s"}, "rows": []}\n' \
            "$name" "$code" >"$out/$name.json"
        { echo "$name: no result, exit code $code"; tail -n 3 "$out/$name.log" 2>/dev/null; } \
            >"$out/$name.md"
    fi
    echo "$name: exit code $code after $((SECONDS - begin)) s"
}

others="--shapes qwen2.5-1.5b,llama-3-8b,qwen3-0.6b,gemma-2-2b"
no_compile=(--skip "unfused compiled=compiling takes the time of ten measurements")

nvidia-smi >"$out/machine.txt" 2>&1 || echo "nvidia-smi: no answer"
# Builds impl="cuda" where it can be built; later steps find it in the cache.
step csrc 150 -m bench.csrc
step gpu_tests 160 -m bench.gpu_tests
step loss_7b 110 -m bench.linear_logprob_loss --rows 8192,32768
step last_token_7b 45 -m bench.last_token --rows 64,8,256,1024
step logprob_7b 50 -m bench.linear_logprob --rows 8192
step train_step 60 -m bench.train_step
step loss_7b_few_rows 40 -m bench.linear_logprob_loss --rows 1024,256,64,8 "${no_compile[@]}"
step profile 30 -m bench.profile_kernels
step loss_others 70 -m bench.linear_logprob_loss $others --rows 8192 --seconds 1 "${no_compile[@]}"
step rollout_score 60 -m bench.rollout_score
step weight_sync 60 -m bench.weight_sync
step last_token_others 25 -m bench.last_token $others --rows 64 --seconds 0.5 "${no_compile[@]}"
step logprob_7b_rest 40 -m bench.linear_logprob --rows 1024,64,32768,256,8 "${no_compile[@]}"

"$python" -m bench.targets bench/results "$out" | tee "$out/targets.md"
