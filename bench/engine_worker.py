"""One engine with one model in a process of its own, timed on request; runs in the environment of that engine.

    python engine_worker.py ENGINE MODEL --batch N --threads T

prints a JSON line when the model is ready, then answers each line on standard input (``{"seconds": s, "calls": n}``)
with the latencies of at least n calls, in milliseconds. `bench.peers` starts these and gives them turns. It needs numpy
and the engine, nothing of this project.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import signal
import sys
import time

import numpy as np


def deepsparse_engine(path, batch, threads):
    os.environ["NM_DISABLE_ANALYTICS"] = "True"
    import deepsparse

    engine = deepsparse.compile_model(path, batch_size=batch, num_cores=threads)
    return lambda x: engine.run([x])[0]


def onnxruntime_engine(path, batch, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def openvino_engine(path, batch, threads):
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda x: request.infer({"x": x})[0]


def sparse_engine_engine(path, batch, threads):
    import sparse_engine

    executable = sparse_engine.load(path, threads=threads)
    return lambda x: executable(x)


def torch_engine(path, batch, threads):
    import torch

    torch.set_num_threads(threads)
    program = torch.export.load(path).module().to(memory_format=torch.channels_last)

    def run(x):
        with torch.inference_mode():
            return program(torch.from_numpy(x)).numpy()

    return run


ENGINES = {
    "deepsparse": deepsparse_engine,
    "onnxruntime": onnxruntime_engine,
    "openvino": openvino_engine,
    "sparse_engine": sparse_engine_engine,
    "torch": torch_engine,
}
DISTRIBUTIONS = {"sparse_engine": "sparse-engine"}


def end_with_parent():
    """Ask Linux to end this process when the one that started it ends: it may be stopped and would never notice."""
    if sys.platform == "linux":
        death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)


def main():
    end_with_parent()
    # Engines print to standard output; the answers get a channel of their own.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--shape", type=int, nargs="+", default=[3, 224, 224])
    parser.add_argument("--output", help="where to write the output for the input of seed 0 (.npy)")
    arguments = parser.parse_args()
    x = np.random.default_rng(0).standard_normal((arguments.batch, *arguments.shape), dtype=np.float32)
    run = ENGINES[arguments.engine](arguments.model, arguments.batch, arguments.threads)
    y = run(x)
    if arguments.output:
        np.save(arguments.output, np.asarray(y))
    run(x)
    version = importlib.metadata.version(DISTRIBUTIONS.get(arguments.engine, arguments.engine))
    print(json.dumps({"ready": True, "version": version}), file=channel, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # The scheduler needs a moment to spread threads over the cores again after another engine's turn.
        settled = time.perf_counter() + request.get("warm", 0.0)
        run(x)
        while time.perf_counter() < settled:
            run(x)
        times = []
        end = time.perf_counter() + request["seconds"]
        while len(times) < request["calls"] or time.perf_counter() < end:
            begin = time.perf_counter()
            run(x)
            times.append((time.perf_counter() - begin) * 1e3)
        print(json.dumps({"ms": times}), file=channel, flush=True)


if __name__ == "__main__":
    main()
