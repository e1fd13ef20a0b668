"""Broken and healthy artefacts, made when they are asked for: small, but by the real libraries.

- :mod:`.making`: bases and adapters of every family, saved by Transformers, PEFT and bitsandbytes, each once per run;
  copies of them to be broken; helpers that edit JSON and tensors.
- :mod:`.broken`: one :class:`~.making.Case` for each way to be broken, with its public thread, the finding that must name
  it, and words of its cause; here of quantization, targets and keys (questions 1 to 3).
- :mod:`.broken_bases`, :mod:`.broken_processors`, :mod:`.broken_unread`: the same of the base's files (5), of processor,
  tokenizer and template (6), and of what is not read at all (0).
- :mod:`.healthy`: set-ups on which every red finding is a false alarm.
- :mod:`.settings`: both kinds, of settings that a file can say and no model can mean.
- :mod:`.values`: both kinds, of adapters whose values matter.
- :mod:`.merging`: both kinds, of merged checkpoints.
- :mod:`.four_bit_merges`: both kinds, of merged checkpoints in 4 bits.
- :mod:`.merged_folders`: both kinds, of what lies beside the weights of a merged checkpoint.
- :mod:`.starts`: both kinds, of adapters whose start took a part out of the base.
- :mod:`.dtypes`: both kinds, of tensors in dtypes that nobody expects.

To add one: a function that takes a ``Workshop`` and a family and returns the arguments of ``preflight``, decorated with
``@broken(...)`` or ``@healthy(...)``.
"""

from . import (  # they register their cases, in this order
    broken_bases,
    broken_processors,
    broken_unread,
    dtypes,
    four_bit_merges,
    merged_folders,
    merging,
    settings,
    starts,
    values,
)
from .broken import BROKEN
from .healthy import HEALTHY
from .making import Case, Workshop

__all__ = [
    "BROKEN",
    "HEALTHY",
    "Case",
    "Workshop",
    "broken_bases",
    "broken_processors",
    "broken_unread",
    "dtypes",
    "four_bit_merges",
    "merged_folders",
    "merging",
    "settings",
    "starts",
    "values",
]
