"""OpenRLHF's command in CPU mode and without the rest of this package; run it with
FOCALPO_AUTOLOAD=0."""

import runpy

from focalpo_plugins.openrlhf import cpu

cpu.stand_in()
runpy.run_module("openrlhf.cli.train_dpo", run_name="__main__", alter_sys=True)
