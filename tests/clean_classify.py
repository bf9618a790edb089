"""Calls an image classifier's SavedModel in a process that imports only TensorFlow.

    python clean_classify.py EXPORT_DIR FILE.npz ANSWER.npz

FILE.npz contains `files`, the bytes of images, and `pixels`, [N, S, S, 3] float32.
"""

import sys

import numpy as np
import tensorflow as tf

export_dir, given, answer = sys.argv[1:]
loaded = tf.saved_model.load(export_dir)
with np.load(given) as arrays:
    files, pixels = (
        [f.tobytes() for f in np.split(arrays["files"], arrays["ends"][:-1])],
        arrays["pixels"],
    )
by_file = [
    loaded.signatures["serving_default"](image=tf.constant(files[i : i + 55]))
    for i in range(0, len(files), 55)
]
found = {key: np.concatenate([part[key].numpy() for part in by_file]) for key in by_file[0]}
found = {key: value.astype(str) if value.dtype == object else value for key, value in found.items()}
by_pixels = loaded.signatures["pixels"](pixels=tf.constant(pixels))
found["pixel_probabilities"] = by_pixels["probabilities"].numpy()
np.savez(answer, **found)
ours = {"tf_keras", "official", "inputs", "training", "models", "tf_lamb"}
print(*(ours & set(sys.modules)), "alone")
