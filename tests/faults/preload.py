"""Imported by the server from which children are forked: what each would read anew; nothing is
computed.
"""

import functools
import gc
import os
from importlib import metadata

import matplotlib.backends.backend_svg
import matplotlib.figure  # noqa: F401
import torch
import torch._dynamo  # what fully_shard loads when it is first called
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import smoldpo.api.train
import smoldpo.cli.doctor
import smoldpo.cli.main
import smoldpo.cli.output
import smoldpo.data.arrow_rows
import smoldpo.engine.sharding
import smoldpo.sweep.run
import smoldpo.training.resume  # noqa: F401
from smoldpo.engine.cache import keys
from smoldpo.reports import templating
from smoldpo.training import fingerprint, run_folder

torch.set_num_threads(1)
fingerprint.version = run_folder.version = keys.version = functools.cache(metadata.version)
for name in run_folder.LIBRARIES:
    keys.version(name)
os.fsync = lambda descriptor: None  # what a kill leaves does not depend on it
get_checkpoint_conversion_mapping("llama")
for template in templating.environment().list_templates(extensions=["html"]):
    templating.environment().get_template(template)
gc.freeze()  # else each child's collections walk through all of it
