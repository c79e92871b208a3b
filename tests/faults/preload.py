"""Imported by the server from which children are forked: modules alone, no computing, no threads."""

import matplotlib.backends.backend_svg
import matplotlib.figure  # noqa: F401
import torch

import smoldpo.cli
import smoldpo.doctor
import smoldpo.resume
import smoldpo.run
import smoldpo.summary  # noqa: F401

torch.set_num_threads(1)
