"""Runs a script with the variants registered: `python -m cpool_vision SCRIPT ARGS`."""
import os
import runpy
import sys

USAGE = 'usage: python -m cpool_vision SCRIPT [ARGS ...]'


def main() -> int:
    """Runs the script as `python SCRIPT ARGS` would, after `import cpool_vision`. Returns 2 where it is not a file."""
    if len(sys.argv) < 2 or sys.argv[1] in ('-h', '--help'):
        print(f'{USAGE}\nRuns a Python script, for example one of timm, with the models of cpool_vision registered.')
        return 0 if len(sys.argv) > 1 else 2
    script = sys.argv[1]
    if not os.path.isfile(script):
        print(f'error: {script!r} is not a file: name a Python script\n{USAGE}', file=sys.stderr)
        return 2
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name='__main__')
    return 0


if __name__ == '__main__':
    sys.exit(main())
