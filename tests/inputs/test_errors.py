"""What is shown of the text of a TensorFlow error."""

import pytest
import tensorflow as tf

from inputs.errors import InputError, first_line, message_in


def test_a_message_of_an_assertion_is_shown_as_it_was_written():
    message = r"--data_dir: /é/it's a [1] \ b, byte 3: damaged."

    def fail(number):
        with tf.control_dependencies([tf.debugging.Assert(number < 0, [f"InputError: {message}"])]):
            return number + 1

    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        next(iter(tf.data.Dataset.range(1).map(fail)))
    assert message_in(caught.value) == message


def test_a_message_of_python_code_ends_with_its_line():
    def read():
        raise InputError("--data_dir: a [1]")
        yield

    batches = tf.data.Dataset.from_generator(read, output_signature=tf.TensorSpec((), tf.int32))
    with pytest.raises(tf.errors.OpError) as caught:
        next(iter(batches))
    assert message_in(caught.value) == "--data_dir: a [1]"
    assert message_in(ValueError("InputErrors")) is None


def test_the_first_line_does_not_name_operations():
    with pytest.raises(tf.errors.OpError) as caught:
        tf.io.decode_image(b"")
    assert first_line(caught.value) == "Input is empty."
    assert first_line(ValueError("a\nb")) == "a" and first_line(ValueError()) == "ValueError"
