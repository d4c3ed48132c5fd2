# mae_dist in a container.
#
#   docker build --build-arg GIT_COMMIT="$(git rev-parse HEAD)" -t mae-dist .
#   docker run --rm mae-dist --help
#
# Training, on a host with the NVIDIA driver and the NVIDIA container toolkit (torch's wheel brings CUDA itself):
#
#   docker run --rm --init --gpus all --ipc=host --ulimit memlock=-1 \
#     -v /data/shards:/data:ro -v "$PWD/runs:/home/mae/runs" \
#     --entrypoint launch/torchrun.sh mae-dist --config configs/vit_b16.yaml
#
#   --ipc=host        the loader's processes hand over batches in shared memory; Docker's 64 MB end in a bus error
#   --ulimit memlock  what InfiniBand and NCCL need; InfiniBand also needs --device=/dev/infiniband, and several nodes
#                     --network=host and the variables in launch/torchrun.sh, each with -e
#   /home/mae/runs     must be writable by user 10001, or add: --user "$(id -u):$(id -g)" -e HOME=/tmp
#
# On a cluster without Docker: apptainer build mae-dist.sif docker-daemon://mae-dist:latest
# The base may be any Debian or Ubuntu whose python3 is 3.11 or newer.
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE} AS build
# hadolint ignore=DL3008 # the base image decides Debian's versions
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/mae_dist
ENV PATH=/opt/mae_dist/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /src
# First the dependencies by themselves: a change of our source does not install torch again.
COPY pyproject.toml ./
RUN python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["demo"], *p["optional-dependencies"]["deepspeed"], sep="\n")' > requirements.txt \
    && pip install -r requirements.txt
COPY README.md LICENSE ./
COPY mae_dist mae_dist
RUN pip install --no-deps . && pip check

FROM ${BASE_IMAGE}
# g++ and Python's headers: for engine.compile
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev g++ && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --home-dir /home/mae --create-home mae
COPY --from=build /opt/mae_dist /opt/mae_dist
WORKDIR /home/mae
COPY launch launch
COPY configs configs
ARG GIT_COMMIT=unknown
ENV PATH=/opt/mae_dist/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    MAE_DIST_GIT_COMMIT=$GIT_COMMIT
LABEL org.opencontainers.image.title="mae_dist" \
      org.opencontainers.image.description="Masked Autoencoder pretraining on clusters" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision=$GIT_COMMIT
USER 10001:10001
ENTRYPOINT ["mae-dist"]
CMD ["--help"]
