#!/usr/bin/env bash
# Check and measure on one NVIDIA GPU, in two acts that fit into 15 minutes together:
#
#     bench/gpu_check.sh probe OUT        150 s: does it work, and one number of each kind
#     bench/gpu_check.sh full OUT         420 s: every target, then the rest while time is left
#
# Needs PyTorch >= 2.11 with Triton, pytest and this checkout; installs nothing, fetches nothing, and
# skips by name what is missing. Every step has its own time limit and leaves a .json, .md and .log,
# also when it fails. OUT/<act>.tar.gz holds them all and is renewed before every step; the table of
# targets ends the run. PYTHON names the interpreter; a copy without .git can name its commit in
# LASER_FAST_COMMIT.
set -u
case "$#:${1:-}" in
2:probe) seconds=140 ;; # a step that does not end when told to takes five more, and the rest two
2:full) seconds=410 ;;
*)
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-$seconds}))
mkdir -p "$2"
archive=$(cd "$2" && pwd)/$1.tar.gz
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/kernels PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu_check.sh: expected a PyTorch that sees an NVIDIA GPU; $python has none" >&2
    exit 1
}
work=$(mktemp -d)
out=$work/$1
mkdir "$out"

export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$work/extensions}

# Two steps may run at once, so an archive takes its place when it is whole.
pack() {
    tar -czf "$archive.$BASHPID" -C "$work" "$(basename "$out")" && mv "$archive.$BASHPID" "$archive"
}

# step NAME LIMIT ARGUMENTS...: run `python ARGUMENTS --json FILE` for at most LIMIT seconds.
step() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) begin=$SECONDS code=no-time
    shift 2
    pack
    if [ $left -gt 5 ]; then
        timeout -k 5 $((limit < left ? limit : left)) \
            "$python" "$@" --json "$out/$name.json" >"$out/$name.log" 2>&1
        code=$?
        # A build that was ended leaves a lock for which every later one would wait.
        [ $code -lt 124 ] || rm -f "$TORCH_EXTENSIONS_DIR"/*/lock
    fi
    [ -s "$out/$name.json" ] || no_result "$name" "exit code $code"
    echo "$name: exit code $code after $((SECONDS - begin)) s"
}

# no_result NAME REASON: leave an empty result that says why it is empty.
no_result() {
    printf '{"header": {"op": "%s", "device": "none", "case": "%s"}, "rows": []}\n' "$@" \
        >"$out/$1.json"
    { echo "$1: no result, $2"; tail -n 3 "$out/$1.log" 2>/dev/null; } >"$out/$1.md"
}

# bench NAME LIMIT MODULE ARGUMENTS...: a benchmark that goes on when a provider ends its process.
bench() { step "$1" "$2" -m bench.guard "bench.$3" "${@:4}"; }

# Ours and the bounds, which need no compiler of minutes and no memory for the logits.
few=(--only "ours triton,ours triton graph,ours cuda,ours cuda graph,bare GEMMs,stream of W")
fast=(--skip "unfused compiled=measured in a step of its own")
others="--shapes qwen2.5-1.5b,llama-3-8b,qwen3-0.6b,gemma-2-2b"

probe() {
    # Half a minute of nvcc and no GPU: builds impl="cuda", which later steps find in the cache.
    step csrc 60 -m bench.csrc &
    step truncation 20 -m bench.truncation
    bench last_token_64 35 last_token --rows 64 --seconds 0.5 \
        --only "ours triton,ours triton graph,bare GEMMs,stream of W"
    wait
    bench loss_8192 40 linear_logprob_loss --rows 8192 --seconds 1 \
        --only "ours triton,ours cuda,ours chunked,bare GEMMs,stream of W"
    # Last, with all the time that is left: each outcome is written as it comes.
    step gpu_tests 150 -m bench.gpu_tests
}

full() {
    step csrc 60 -m bench.csrc
    bench loss_8192 30 linear_logprob_loss --rows 8192 "${fast[@]}"
    bench last_token_64 25 last_token --rows 64 --seconds 1 "${fast[@]}"
    bench logprob_8192 25 linear_logprob --rows 8192 --seconds 1 "${fast[@]}"
    bench loss_32768 40 linear_logprob_loss --rows 32768 --seconds 1 "${fast[@]}"
    for rows in 128 256 512 1024; do
        bench last_token_$rows 15 last_token --rows $rows --seconds 0.5 "${few[@]}"
    done
    step gpu_tests 70 -m bench.gpu_tests
    bench train_step 40 train_step
    bench loss_8192_compiled 60 linear_logprob_loss --rows 8192 --seconds 1 \
        --only "unfused,unfused compiled,bare GEMMs"
    step profile 20 -m bench.profile_kernels
    for rows in 1024 256 64 8; do
        bench loss_$rows 15 linear_logprob_loss --rows $rows --seconds 0.5 "${fast[@]}"
    done
    bench loss_others 60 linear_logprob_loss $others --rows 8192 --seconds 0.5 "${fast[@]}"
    needs_vllm rollout_score 60
    needs_vllm weight_sync 60
    bench last_token_others 25 last_token $others --rows 64 --seconds 0.5 "${fast[@]}"
    bench logprob_32768 25 linear_logprob --rows 32768 --seconds 0.5 "${fast[@]}"
}

# needs_vllm NAME LIMIT: what generates, where its packages are.
needs_vllm() {
    local missing
    missing=$("$python" -c 'if 1:
        import sys, importlib.util
        print(*(name for name in sys.argv[1:] if not importlib.util.find_spec(name)))' \
        vllm pydantic tomli_w)
    if [ -z "$missing" ]; then
        step "$1" "$2" -m "bench.$1"
    else
        no_result "$1" "no $missing"
        echo "$1: skipped, no $missing"
    fi
}

nvidia-smi >"$out/machine.txt" 2>&1 || echo "nvidia-smi: no answer"
"$1"
"$python" -m bench.targets bench/results "$out" >"$out/targets.md"
pack
cat "$out/targets.md"
rm -rf "$work"
