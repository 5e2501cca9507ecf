"""Templates that would take all memory, or hours, without bounds; as a program, it prints what each of them takes."""

import json
import os
import resource
import sys
import time
from pathlib import Path

LONG = "{% for a in ['" + "x" * 4000 + "'] %}"
BOMBS = [
    "{{ '{:>3000000000}'.format(1) }}",
    "{{ '{:>3000000000}'['format'](1) }}",
    "{{ '{a:>3000000000}'.format_map({'a': 1}) }}",
    "{{ '%3000000000d' % 1 }}",
    "{{ '%3000000000d' | format(1) }}",
    "{{ [1] | tojson(indent=3000000000) }}",
    "{{ 'x' | indent(3000000000) }}",
    "{{ 'x' | center(3000000000) }}",
    "{{ 'x'.center(3000000000) }}",
    "{{ dimensions | batch(3000000000, 'x') | list }}",
    "{{ 'x' * 9999999999 }}",
    "{{ dimensions * 9999999999 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 999999999999 " + "* 999999999999 " * 600 + "}}",
    "{{ 1" + "0" * 5000 + " }}",
    "{{ ('" + "9" * 4000 + "' | int) * 2 }}",
    "{{ 5 | round(-4000000000) }}",
    "{{ lipsum(n=10000000) }}",
    "{% for i in range(1000000000) %}x{% endfor %}",
    "{% for i in range(999) %}{% for j in range(999) %}{% if i == j %}{% endif %}{% endfor %}{% endfor %}x",
    "{% for i in range(99) %}{% for j in range(99) %}{% for k in range(99) %}x{% endfor %}{% endfor %}{% endfor %}",
    "{% for i in ['x'] recursive %}{{ loop(['x', 'x']) }}{% endfor %}",
    "{% for i in '" + "x" * 4000 + "' %}{% for j in '" + "x" * 4000 + "' %}{{ j }}{% endfor %}{% endfor %}",
    "{% for i in range(1000) %}{% for j in range(90) %}" + "{% if i in range(1000) %}{% endif %}" * 99 + "{% endfor %}"
    "{% endfor %}x",
    "{% for i in range(1000) %}" + "{{ 'x' if dimensions | sort == dimensions | unique }}" * 150 + "{% endfor %}x",
    "{% set a = 'xx' %}" + "{% set a = a ~ a %}" * 40 + "{{ a }}",
    "{% with a = 'xx' %}" + "{% with a = a ~ a %}" * 40 + "{{ a }}" + "{% endwith %}" * 41,
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'x'" + " | replace('x', 'xxxxxxxxxx')" * 12 + " }}",
    "{{ 'x'" + " | list | join('xxxxxxxxxx') | replace('x', 'xxxxxxxxxx')" * 8 + " }}",
    "{{ range(1000) | join(range(1000) | join(range(1000) | join(range(1000) | join('x')))) }}",
    LONG + "{{ " + "a ~ " * 1400 + "a }}{% endfor %}",
    LONG + "{{ " + "a + " * 1400 + "a }}{% endfor %}",
    LONG + "{{ [" + "a | upper, " * 500 + "] | join(a) }}{% endfor %}",
    LONG + "{% for b in [[" + "a, " * 900 + "]] %}{{ [" + "b, " * 900 + "] }}{% endfor %}{% endfor %}",
    LONG + "{% for b in range(1000) %}" + "{{ a }}" * 99 + "{% endfor %}{% endfor %}",
    "{{ " + "(" * 4900 + "1" + ")" * 4900 + " }}",
    "{{ " + "[" * 4900 + "]" * 4900 + " }}",
    "{{ " + "1 + " * 2400 + "1 }}",
    "{{ " + "not " * 2400 + "1 }}",
    "{% if 1 %}" * 400 + "x" + "{% endif %}" * 400,
    "x" * 1_000_000,
]
MIB = 2**20


def taken(take):
    """What a bomb is refused with, the CPU seconds that it took, and by how much the process has grown since."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        refusal = take() and None
    except MemoryError as error:
        refusal = repr(error)
    except ValueError as error:
        refusal = str(error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return [refusal, time.process_time() - started, grown / 1024]


def main(way):
    """Take every bomb as a YAML's check does, or as a saved model's `mopo.json` is read back."""
    from axolotl_mopo.config import Directives, parse_settings
    from axolotl_mopo.config.model_files import Manifest
    from axolotl_mopo.records import read_record

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 500 * MIB,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
    path = Path("mopo.json")

    def by_yaml(template):
        return parse_settings(Directives, {"integrated": template}, "amopo.directives")

    def by_model(template):
        path.write_text(json.dumps({"method": "amopo", "dimensions": ["a"], "directives": {"integrated": template}}))
        return read_record(Manifest, path).prompt_settings()

    take = by_yaml if way == "yaml" else by_model
    json.dump([taken(lambda template=template: take(template)) for template in BOMBS], sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
