"""From a config to every artifact of its run, and the phases that build them."""
