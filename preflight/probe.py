"""Tries what training needs: imports, devices, and compilation with XLA.

    python -m preflight.probe

`preflight.doctor` runs it in a child process, because each stage can crash or hang. It prints one
JSON object per stage: `stage`, and either `error` or what was found.
"""

import importlib
import json

# The last one is the program itself, which imports more packages, and modules of these packages.
IMPORTS = ("tensorflow", "tensorflow_text", "tf_keras", "official", "orbit", "train")
STAGES = (*IMPORTS, "devices", "XLA")


def find_devices(tf) -> dict:
    """Returns the devices that TensorFlow finds.

    Args:
        tf: the module `tensorflow`.

    Returns:
        A dict with `cuda_build`, whether TensorFlow is built with CUDA; `gpus`, a list of names;
        and `tpus`, the number of TPU devices, each of which runs a replica.
    """
    build = tf.sysconfig.get_build_info()
    found = {"cuda_build": bool(build.get("is_cuda_build")), "gpus": [], "tpus": 0}
    for gpu in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        found["gpus"].append(details.get("device_name", gpu.name))
    if tf.config.list_physical_devices("TPU_SYSTEM"):
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver("local")
        tf.tpu.experimental.initialize_tpu_system(resolver)
        found["tpus"] = len(tf.config.list_logical_devices("TPU"))
    return found


def run_xla(tf) -> dict:
    """Multiplies two matrices of ones with XLA on the device that training would use.

    Args:
        tf: the module `tensorflow`.

    Returns:
        A dict with `device`, the name of that device.

    Raises:
        ArithmeticError: the result is wrong.
    """

    def product():
        return tf.reduce_sum(tf.matmul(tf.ones([64, 64]), tf.ones([64, 64])))

    if tf.config.list_logical_devices("TPU"):
        strategy = tf.distribute.TPUStrategy()
        result = strategy.experimental_local_results(strategy.run(tf.function(product)))[0]
    else:
        result = tf.function(product, jit_compile=True)()
    if float(result) != 64**3:
        raise ArithmeticError(f"the sum of a 64 x 64 x 64 product of ones is {float(result)}")
    return {"device": result.device}


def main():
    """Runs all stages. If one fails, the following ones still run."""
    modules = {}
    for stage in STAGES:
        found = {"stage": stage}
        try:
            if stage == "devices":
                found |= find_devices(modules["tensorflow"])
            elif stage == "XLA":
                found |= run_xla(modules["tensorflow"])
            else:
                modules[stage] = importlib.import_module(stage)
        except Exception as error:  # whatever it is, it is the result of the stage
            lines = [line for line in str(error).splitlines() if line.strip()]
            found["error"] = f"{type(error).__name__}: {lines[0] if lines else ''}"
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
