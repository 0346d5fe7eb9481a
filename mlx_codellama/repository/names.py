"""Classify files by their names."""

from __future__ import annotations

import posixpath

from mlx_codellama.errors import printable

_KEY_ENDINGS = (
    *(".pem", ".key", ".p8", ".p12", ".pfx", ".jks", ".keystore", ".kdbx", ".kdb", ".ppk", ".gpg", ".pgp", ".asc"),
    *(".ovpn", ".tfstate", ".tfvars", ".agekey", ".netrc", ".npmrc", ".pypirc", ".htpasswd", ".pgpass"),
)
_SECRET_NAMES = frozenset(
    (
        *(".netrc", "_netrc", ".npmrc", ".pypirc", ".pgpass", ".htpasswd", "htpasswd", ".git-credentials", ".envrc"),
        *(".dockercfg", ".dockerconfigjson", ".vault-token", ".my.cnf", ".boto", ".s3cfg", "kubeconfig"),
        *("master.key", "passwords", "passwords.txt", "password.txt", "token.txt", "tokens.txt"),
    )
)
_SECRET_STARTS = ("id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "id_xmss", "credentials", "client_secret")
_SECRET_DATA = ("secret", "secrets", "credential", "service-account", "service_account", "serviceaccount")
_DATA_ENDINGS = ("", ".json", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf", ".txt", ".xml", ".properties")
_COPIES = (".bak", ".old", ".orig", ".save", ".swp", ".tmp", ".copy", ".backup", ".disabled", "~")

# By suffix. A file with another suffix, or none, is not code.
_CODE_ENDINGS_TEXT = (
    ".py .pyi .pyx .pxd .c .h .cc .cpp .cxx .hpp .hh .hxx .inl .ipp .tcc .cu .cuh .m .mm .metal .cl .glsl .hlsl "
    ".wgsl .vert .frag .comp .java .kt .kts .scala .groovy .clj .cljs .cljc .js .jsx .ts .tsx .mjs .cjs .mts .cts "
    ".vue .svelte .go .rs .swift .cs .fs .fsx .vb .php .dart .zig .nim .cr .d .v .sv .vhd .vhdl .proto .thrift "
    ".graphql .rb .pl .pm .raku .lua .sql .hs .elm .ml .mli .ex .exs .erl .hrl .el .lisp .scm .rkt .jl .r .f .f90 "
    ".f95 .f03 .for .pas .ada .adb .ads .cob .asm .s .sh .bash .zsh .fish .ps1 .bat .awk .tcl .coffee .sol .move "
    ".cairo .ino .gd .hx .pony .re .res .purs .idr .agda .lean .coq .sml .st .pro .cls .apex .abap .prolog .vim"
)
CODE_ENDINGS = frozenset(_CODE_ENDINGS_TEXT.split())
_SETTINGS_ENDINGS_TEXT = (
    ".json .json5 .jsonc .yaml .yml .toml .cfg .ini .conf .properties .plist .editorconfig .cmake .mk .mak .ninja "
    ".gradle .sbt .bazel .bzl .nix .tf .hcl .sln .csproj .vcxproj .vbproj .fsproj .pbxproj .props .targets .mod "
    ".sum .in .am .ac .m4 .spec .podspec .gemspec .cabal .xml .xsd .service .dockerfile .typed .pc .def"
)
_SETTINGS_ENDINGS = frozenset(_SETTINGS_ENDINGS_TEXT.split())
_SETTINGS_NAMES_TEXT = (
    "makefile gnumakefile dockerfile containerfile jenkinsfile procfile vagrantfile gemfile podfile brewfile "
    "pipfile cmakelists.txt requirements.txt constraints.txt workspace build justfile codeowners configure"
)
_SETTINGS_NAMES = frozenset(_SETTINGS_NAMES_TEXT.split())
_PROSE_ENDINGS_TEXT = ".md .markdown .mdx .rst .txt .text .adoc .asciidoc .org .tex .bib .html .htm .rtf"
_PROSE_ENDINGS = frozenset(_PROSE_ENDINGS_TEXT.split())
_PROSE_NAMES_TEXT = "readme changelog changes history news contributing todo authors thanks faq install"
_PROSE_NAMES = frozenset(_PROSE_NAMES_TEXT.split())
_METADATA_NAMES_TEXT = (
    "license licence copying copyright notice unlicense patents wheel metadata record installer requested pkg-info "
    "top_level.txt entry_points.txt sources.txt requires.txt dependency_links.txt version manifest maintainers"
)
_METADATA_NAMES = frozenset(_METADATA_NAMES_TEXT.split())
CODE, OTHER, SETTINGS, PROSE, METADATA = range(5)


def kind_of(path: str) -> int:
    """CODE, OTHER, SETTINGS, PROSE or METADATA, by name alone. Earlier kinds are more useful as context for code."""
    name = posixpath.basename(path).lower()
    stem, ending = posixpath.splitext(name)
    if ending in CODE_ENDINGS:
        return CODE
    first = name.split(".")[0].split("-")[0]
    if name in _METADATA_NAMES or stem in _METADATA_NAMES or first in ("license", "licence", "copying"):
        return METADATA
    if name in _SETTINGS_NAMES or ending in _SETTINGS_ENDINGS or first in ("dockerfile", "makefile"):
        return SETTINGS
    if ending in _PROSE_ENDINGS or first in _PROSE_NAMES:
        return PROSE
    return OTHER


def may_hold_secrets(name: str) -> bool:
    """Whether files of this name usually hold keys, passwords or tokens."""
    name = name.lower()
    while name.endswith(_COPIES):
        name = name.removesuffix(next(copy for copy in _COPIES if name.endswith(copy)))
    if name in _SECRET_NAMES or name.endswith(_KEY_ENDINGS) or name.startswith(_SECRET_STARTS):
        return True
    stem, ending = posixpath.splitext(name)
    if ending in CODE_ENDINGS:
        return False
    if ending in _DATA_ENDINGS and (stem in _SECRET_DATA or stem.startswith(_SECRET_DATA[-3:])):
        return True
    return "env" in name.split(".")[1:] or name == "env"


def is_plain(name: str) -> bool:
    """Whether a name is UTF-8 and prints as one line without escapes."""
    return printable(name) == name
