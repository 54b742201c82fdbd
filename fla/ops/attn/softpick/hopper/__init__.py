"""Attention kernels for Hopper (sm_90), written in Gluon: warp-specialised, with TMA and wgmma. README.md explains them."""
