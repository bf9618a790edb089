"""Tries what training needs, one thing after the other: python -m preflight.probe

`preflight.doctor` runs it as a process of its own, since each of these can crash or hang. It prints
one JSON object per stage: `stage`, and `error` or what was found.
"""

import importlib
import json

# What each stage but the first needs is done by the ones before it.
STAGES = ("tensorflow", "tensorflow_text", "tf_keras", "official", "orbit", "devices", "XLA")


def _devices(tf):
    wheel = tf.sysconfig.get_build_info()
    found = {"cuda_build": bool(wheel.get("is_cuda_build")), "gpus": [], "tpus": 0}
    for gpu in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        found["gpus"].append(details.get("device_name", gpu.name))
    if tf.config.list_physical_devices("TPU_SYSTEM"):
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver("local")
        tf.tpu.experimental.initialize_tpu_system(resolver)
        found["tpus"] = len(tf.config.list_logical_devices("TPU"))
    return found


def _compile(tf):
    """A product of two matrices of ones, by XLA, where training would compute it."""

    def product():
        return tf.reduce_sum(tf.matmul(tf.ones([64, 64]), tf.ones([64, 64])))

    if tf.config.list_logical_devices("TPU"):
        strategy = tf.distribute.TPUStrategy()
        one = strategy.experimental_local_results(strategy.run(tf.function(product)))[0]
    else:
        one = tf.function(product, jit_compile=True)()
    if float(one) != 64**3:
        raise ArithmeticError(f"64 x 64 x 64 ones came out as {float(one)}")
    return {"device": one.device}


def main():
    """Goes through the stages; one that fails does not keep the others from being tried."""
    modules = {}
    for stage in STAGES:
        found = {"stage": stage}
        try:
            if stage == "devices":
                found |= _devices(modules["tensorflow"])
            elif stage == "XLA":
                found |= _compile(modules["tensorflow"])
            else:
                modules[stage] = importlib.import_module(stage)
        except Exception as error:  # whatever it is, it is the finding
            lines = [line for line in str(error).splitlines() if line.strip()]
            found["error"] = f"{type(error).__name__}: {lines[0] if lines else ''}"
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
