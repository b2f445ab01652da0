"""Training of T-TAME heads; in the installed package this folder is `hf_ttame.training`."""
