"""What a plan says of each layer."""

import re

import retrofit


def decisions(model, **options):
    """Path to decision and reason, without how to ask for a BatchNorm all the same."""
    said = re.compile("(: the model returns its values)?; include=.*")
    sites = retrofit.plan(model, **options).sites
    return {site.path: (site.decision, said.sub("", site.reason)) for site in sites}
