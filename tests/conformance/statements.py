"""What callers of PyTorch's FX API can observe, as numbered statements in our own words.

``S3.2b`` is the second claim of the second point on qconfigs. ``T``: people's tests insist on it;
``O``: seen, kept; ``Q``: a quirk, where fxquant does something else and ``docs/differences.md``
says so. A test claims statements with ``@pytest.mark.statement("S3.2b", ...)``;
``python tests/conformance/list_untested.py`` lists those that no test claims.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Statement:
    """One claim.

    Attributes:
        id: section, point and letter.
        tag: ``T``, ``O`` or ``Q``.
        text: the claim in one line.
    """

    id: str
    tag: str
    text: str


_TABLE = """
S1.1a T the five steps take torch.ao's parameters, in its order and by its keywords
S1.2a O configs may be dicts, with a FutureWarning; unknown keys are no error
S1.3a T example inputs may be anything, None too; leaving them out is a TypeError
S1.4a T any module, a GraphModule, an unpickled or pre-fused one is prepared, training or not
S1.4b O a training model with conv-bn cannot be prepared or fused for inference
S1.5a T results are GraphModules that survive copies, script, Transformer, states and files
S1.6a O prepare leaves the weights and the tree of the model; convert consumes the prepared one
S1.7a T a prepared model computes the float result
S1.8a T stack traces of nodes survive every step
S1.9a T only preserved attributes are kept, through deepcopy too, and convert needs its own list
S2.1a T modules of torch.nn are leaves; non-traceable ones stay untouched, in training too
S2.2a T stubs vanish and FloatFunctional becomes functions
S2.2b T in-place arithmetic counts as plain arithmetic
S2.3a T tuple arguments stay tuples
S2.3b T models may return None, dicts and nested lists
S3.1a T global < type < regex < name < name, type and order; None wins like any value
S3.2a T a module's type is its exact class, a function's its target, a method's its name
S3.2b O functions and methods obey the name, a regex and the class of the module around them
S3.3a O the nearest configured ancestor governs; names beat types below them
S3.3b O the class of a container governs its functions, not its modules
S3.4a O regexes are anchored on the left; the first in order that matches wins
S3.5a T order counts the direct calls of a type in a scope, from 0
S3.6a O a fused op has the qconfig of its base; by type all members must be configured alike
S3.6b T equal qconfigs that are distinct objects are the same
S3.7a T prepared modules carry their qconfig
S3.7b T convert removes qconfigs unless told to keep them
S3.8a T fixed-qparams ops want fixed-qparams observers, else a warning and float
S3.8b T an empty backend config quantizes nothing and warns of nothing
S3.9a T a qconfig must fit the dtypes, ranges and smallest scale of the backend
S3.9b T qnnpack's defaults fit qnnpack's backend config
S3.10a O the mapping given to convert may only switch entries off
S3.10b O what is switched off comes out in float with its neighbours still quantized
S4.1a T conv, linear, transposed conv and batch-norm fuse with bn and relu in evaluation
S4.1b T torch.relu, the relu method and other activations do not fuse by default
S4.1c Q a transposed conv before bn and relu stays alone where bn and relu fuse
S4.2a T in training conv-bn and linear-bn become trainable fused modules
S4.2b O a transposed conv before bn cannot be trained
S4.3a T a producer with several users is not fused; a relu used twice fuses with each
S4.3b Q a conv called twice is fused for both calls
S4.4a T onednn alone fuses linear with leaky relu and tanh, and conv with add
S4.5a T the fused module has the first one's name and the others are gone
S4.6a T custom patterns in reverse, with fuser and getters, are followed
S5.1a T observers are activation_post_process_N on the root, counted in graph order
S5.2a T one observer a value and dtype, read by all
S5.2b O shape questions to a graph input read the raw input
S5.3a T an input is observed by its consumer's qconfig, an output by its own
S5.3b Q of two consumers with different qconfigs of one dtype the first decides
S5.3c O static and dynamic consumers get two observers, beside or behind each other
S5.4a T weighted ops, norms, binary ops and some activations have output observers of their own
S5.5a T ops that move or clamp values share the observer of their input
S5.6a T cat has one observer for inputs and output, and few quantize steps
S5.7a T chunk, bmm and masked_fill are not quantized
S5.7b O neither are torch.reshape, flatten methods, gelu, sub and others
S5.7c T channel_shuffle is quantized between quantized neighbours only
S5.8a T add or mul and a relu behind it are one unit, observed behind the relu
S5.9a T ints, bools, sizes, masks and index arguments are never observed
S5.9b Q integer tensors that reach add or mul are observed
S5.10a T an item of a list input is observed only for a quantized consumer
S5.11a T functional weights have weight observers, once each; biases none but in float16
S5.12a T weights of modules are observed at convert, once, after folding
S5.13a T a sigmoid that comes first has its input observed by its own kind
S5.13b Q which clips the input to the range of the output
S5.14a T a reuse-input qconfig shares, or inserts nothing
S5.15a T per-channel weights of transposed convs are an AssertionError
S5.16a T quantized inputs are not observed; quantized outputs are not dequantized
S5.16b O ops that cannot be quantized stay float there
S5.17a T observers are made on the model's device, and move with it
S6.1a T every observer becomes the quantize and dequantize of its kind; counts are exact
S6.2a T scales and zero points are buffers of the root, named by path and smallest free number
S6.3a T reference modules keep float weights with their parameters, in the state dict too
S6.4a T reference and lowered outputs are equal bit for bit for conv and linear families
S6.5a T int8 activations and mixed dtypes work in the reference form
S7.1a O lowering goes by the reference graph, whatever qconfig made it
S7.1b T ops that are not quantized keep dq before and get q behind only where wanted
S7.2a T which module classes become quantized ones
S7.3a T which functions become quantized operators, keyword arguments included
S7.4a T functional weights are packed once, loadable, absent from a scripted state dict
S7.5a T parameter buffers exist for quantized inputs and functional ops only
S7.6a T add and mul with a number need no scale of their own
S7.6b O with a number computed in the graph they run in float
S7.7a T softmax has scale 1/256; sigmoid and tanh fix their own parameters
S7.8a T one quantize a value, dequantize before float readers only; pairs that cancel go
S7.9a T size and shape are read from the quantized tensor
S7.10a T two calls of a custom module: swapped once, runs
S7.10b Q a linear called twice has the output parameters of its last call for both
S7.11a Q ops with neighbours' observers, alpha, keyword operands and static after dynamic
S7.12a T an uncalibrated model converts, with a warning
S7.13a O convert says what it needs where it gets something else
S7.14a T the defaults of the engines; an unknown one is an AssertionError
S8.1a T default dynamic linears: no q or dq left, nothing else touched, no run needed
S8.2a T float16 dynamic linears likewise
S8.3a T recurrent modules equal eager dynamic quantization, and script and load again
S8.4a T static float16 does nothing by default and casts under its own backend config
S8.5a T embeddings are quantized by weight-only float-qparams qconfigs alone
S8.5b O a wrong QAT qconfig of an embedding is an AssertionError
S9.1a T standalone modules, with float and quantized interfaces, equal the flat model
S9.2a T custom modules go through from_float and from_observed, quantized in and out
S9.2b T dynamic custom modules, several users, several calls
S9.3a T an LSTM as a custom module: counts of q, dq and getitem
S10.1a T observer state dicts through files give the same quantized results
S10.2a T converted states load exactly, through files too
S10.3a T QAT-prepared models script, and their fake quantizers can be switched
S10.3b T fused and plain fake quantizers train alike
S10.4a T names and numbers of a saved model of 2021
"""

STATEMENTS: tuple[Statement, ...] = tuple(
    Statement(*line.split(" ", 2)) for line in _TABLE.strip().splitlines()
)
