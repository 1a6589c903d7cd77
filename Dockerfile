# DualEdit Kernels with the embedded model: the demo, or a page and a service.
#
#   docker build -t dualedit .                                   # without a GPU: --build-arg TORCH_INDEX=<PyTorch's CPU index>
#   docker run --rm -v "$PWD/demo_output:/data" dualedit         # the demo; its page: demo_output/demo.html
#   docker run --rm -p 127.0.0.1:8000:8000 -v edits:/data dualedit serve --model toy --host 0.0.0.0 --edits /data/edits
#
# The service prints a token; changes of the edits need it. It has no encryption: publish the port to a proxy with TLS.

FROM python:3.12-slim AS build
ARG TORCH="torch==2.13.0"
ARG TORCH_INDEX=""
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/dualedit
ENV PATH="/opt/dualedit/bin:$PATH"
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH" \
    && pip install --no-cache-dir "setuptools>=77" wheel ninja
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY dualedit_kernels dualedit_kernels
COPY python python
# Without build isolation, because the C++ library is compiled against the torch that is installed here.
RUN pip install --no-cache-dir --no-build-isolation ".[toy,page]"

FROM python:3.12-slim
COPY --from=build /opt/dualedit /opt/dualedit
ENV PATH="/opt/dualedit/bin:$PATH" OMP_NUM_THREADS=1
RUN useradd --create-home dualedit && mkdir /data && chown dualedit /data
USER dualedit
WORKDIR /data
VOLUME /data
EXPOSE 8000
RUN dualedit doctor
ENTRYPOINT ["dualedit"]
CMD ["demo", "--model", "toy", "--json", "/data/demo.json", "--page", "/data/demo.html"]
