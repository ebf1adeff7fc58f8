# Three images from one file: operator (no torch), preflight (the trainer's code without torch), trainer.
# Layers go from what changes least to what changes most: base, torch, other packages, code. A change of code rebuilds
# only the last and small one; torch (5 GB) has a lock file of its own, so that another package's new version spares it.
# /opt/sbom.cdx.json in each of them says what it is made of: `docker run --rm --entrypoint cat IMAGE /opt/sbom.cdx.json`.
# Builds with Docker, and with buildah on a base made by hack/images/base (see hack/images/build).
ARG BASE=python:3.11-slim

# pip and the build backend, which are in no image.
FROM ${BASE} AS tools
COPY requirements/build.lock /build/
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    python3 -m venv /tools \
    && PIP_CONFIG_FILE=/run/secrets/pip /tools/bin/pip install --no-cache-dir --require-hashes -r /build/build.lock

# The wheel's content, laid out as in the images.
FROM tools AS code
WORKDIR /build
COPY pyproject.toml README.md ./
COPY crds/finetune_api crds/finetune_api
COPY operator/finetune_operator operator/finetune_operator
COPY trainer/finetune_trainer trainer/finetune_trainer
RUN python3 -m venv --without-pip /opt/venv \
    && /tools/bin/pip wheel --no-index --no-deps --no-build-isolation -q -w /build/dist . \
    && /tools/bin/pip --python /opt/venv/bin/python install --no-index --no-deps -q /build/dist/*.whl \
    && rm -f /opt/venv/bin/python* /opt/venv/bin/?ctivate* /opt/venv/pyvenv.cfg /opt/venv/lib64

# What the three have in common. Any UID may run them on a read-only root: all that is written goes below /tmp.
FROM ${BASE} AS common
RUN python3 -m venv --without-pip /opt/venv
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp USER=finetune \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 65532:65532

# The kubernetes package is 126 MB of generated modules, of which a few are used: as a zip, which Python imports from, it
# takes 20 MB and loads faster.
FROM common AS operator
COPY requirements/operator.lock /opt/requirements/
USER 0
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    python3 -m venv /tmp/pip \
    && PIP_CONFIG_FILE=/run/secrets/pip /tmp/pip/bin/pip --python /opt/venv/bin/python \
       install -q --no-cache-dir --require-hashes -r /opt/requirements/operator.lock \
    && rm -rf /tmp/pip \
    && cd /opt/venv/lib/python3*/site-packages \
    && find kubernetes -name __pycache__ -prune -exec rm -r {} + \
    && python3 -m compileall -b -q --invalidation-mode unchecked-hash kubernetes \
    && python3 -m zipfile -c kubernetes.zip kubernetes \
    && rm -r kubernetes && echo "$PWD/kubernetes.zip" >kubernetes.pth
RUN --mount=type=bind,source=hack/images/sbom.py,target=/build/sbom.py python3 /build/sbom.py finetune-operator >/opt/sbom.cdx.json
USER 65532:65532
ENTRYPOINT ["finetune-operator"]
COPY --from=code /opt/venv /opt/venv

FROM common AS training
ENV HF_HOME=/tmp/huggingface HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor TRITON_CACHE_DIR=/tmp/triton
ENTRYPOINT ["finetune"]

FROM training AS preflight
COPY requirements/preflight.lock /opt/requirements/
USER 0
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    python3 -m venv /tmp/pip \
    && PIP_CONFIG_FILE=/run/secrets/pip /tmp/pip/bin/pip --python /opt/venv/bin/python \
       install -q --no-cache-dir --require-hashes -r /opt/requirements/preflight.lock \
    && rm -rf /tmp/pip
RUN --mount=type=bind,source=hack/images/sbom.py,target=/build/sbom.py python3 /build/sbom.py finetune-preflight >/opt/sbom.cdx.json
USER 65532:65532
COPY --from=code /opt/venv /opt/venv

FROM training AS trainer
COPY requirements/torch.lock /opt/requirements/
USER 0
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    python3 -m venv /tmp/pip \
    && PIP_CONFIG_FILE=/run/secrets/pip /tmp/pip/bin/pip --python /opt/venv/bin/python \
       install -q --no-cache-dir --require-hashes -r /opt/requirements/torch.lock \
    && rm -rf /tmp/pip
COPY requirements/trainer.lock /opt/requirements/
# seqeval and rouge-score are published as sources only: --use-pep517 builds them apart, with what they need for that.
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    python3 -m venv /tmp/pip \
    && PIP_CONFIG_FILE=/run/secrets/pip /tmp/pip/bin/pip --python /opt/venv/bin/python \
       install -q --no-cache-dir --use-pep517 --require-hashes -r /opt/requirements/trainer.lock \
    && rm -rf /tmp/pip
RUN --mount=type=bind,source=hack/images/sbom.py,target=/build/sbom.py python3 /build/sbom.py finetune-trainer >/opt/sbom.cdx.json
USER 65532:65532
COPY --from=code /opt/venv /opt/venv
