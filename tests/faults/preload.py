"""Imported by the server from which children are forked: what each would read anew; nothing is computed."""

import gc

import matplotlib.backends.backend_svg
import matplotlib.figure  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import smoldpo.cli
import smoldpo.cli_plan
import smoldpo.doctor
import smoldpo.resume
import smoldpo.run
import smoldpo.summary  # noqa: F401
from smoldpo import pages

torch.set_num_threads(1)
get_checkpoint_conversion_mapping("llama")
for template in pages.environment().list_templates(extensions=["html"]):
    pages.environment().get_template(template)
gc.freeze()  # else each child's collections walk through all of it
