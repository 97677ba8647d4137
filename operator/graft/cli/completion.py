"""Scripts for the completion of a shell, made from the parser (PURE)."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Shell = Literal["bash", "zsh", "fish"]
SHELLS: tuple[Shell, ...] = ("bash", "zsh", "fish")
PROGRAMS = ("graft", "kubectl-graft")


@dataclass(frozen=True)
class Command:
    """One command of the parser."""

    name: str
    help: str
    options: list[argparse.Action]

    @property
    def flags(self) -> list[str]:
        return [flag for option in self.options for flag in option.option_strings]


def commands_of(parser: argparse.ArgumentParser) -> Iterator[Command]:
    """Yield the commands of a parser, in its order."""
    [choices] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    texts = {action.dest: action.help or "" for action in choices._choices_actions}
    for name, command in choices.choices.items():
        yield Command(name, texts.get(name, ""), list(command._actions))


def script(shell: Shell, parser: argparse.ArgumentParser) -> str:
    """Return the script that completes the commands, options and fixed values of a parser in a shell."""
    commands = list(commands_of(parser))
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


def proposals(words: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], bool]:
    """Return the words that may stand instead of the last one, and whether it may be the name of a file (PURE)."""
    commands = {command.name: command for command in commands_of(parser)}
    *before, word = words
    if not before:
        return [name for name in commands if name.startswith(word)], False
    if (command := commands.get(before[0])) is None:
        return [], False
    if word.startswith("-"):
        return [flag for flag in command.flags if flag.startswith(word)], False
    last = before[-1] if before[-1].startswith("-") else ""
    fixed = [option.choices for option in command.options if last in (option.option_strings or [""])]
    choices = [str(choice) for options in fixed for choice in options or ()]
    return [choice for choice in choices if choice.startswith(word)], not choices


def _bash(commands: list[Command]) -> str:
    values = [
        (f"{command.name}:{flag}", " ".join(map(str, option.choices)))
        for command in commands
        for option in command.options
        if option.choices
        for flag in option.option_strings or ("",)
    ]
    fixed = "\n".join(f'    {key}) words="{words}" ;;' for key, words in values)
    flags = "\n".join(f'    {command.name}) words="{" ".join(command.flags)}" ;;' for command in commands)
    return f"""# bash: source <(graft completion bash)
_graft() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{" ".join(command.name for command in commands)} --help --version"
  elif [[ $word == -* ]]; then
    case $command in
{flags}
    esac
  else
    [[ $before == -* ]] || before=""
    case "$command:$before" in
{fixed}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _graft {" ".join(PROGRAMS)}
"""


def _zsh(commands: list[Command]) -> str:
    names = "\n".join(f"    {_quoted(f'{command.name}:{command.help}')}" for command in commands)
    cases = []
    for command in commands:
        lines = [f"      {_quoted(spec)}" for option in command.options for spec in _zsh_specs(option)]
        cases.append(f"    {command.name}) _arguments -s \\\n" + " \\\n".join(lines) + " ;;")
    return f"""#compdef {" ".join(PROGRAMS)}
# zsh: source <(graft completion zsh)
_graft() {{
  local -a commands=(
{names}
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  shift words
  (( CURRENT-- ))
  case $words[1] in
{chr(10).join(cases)}
  esac
}}
compdef _graft {" ".join(PROGRAMS)}
"""


def _zsh_specs(option: argparse.Action) -> Iterator[str]:
    words = f"({' '.join(map(str, option.choices))})" if option.choices else "_files"
    about = (option.help or "").replace("[", "(").replace("]", ")").replace(":", "\\:")
    for flag in option.option_strings:
        yield f"{flag}[{about}]" if option.nargs == 0 else f"{flag}[{about}]:value:{words}"
    if not option.option_strings:
        yield f"*:{option.dest}:{words}"


def _fish(commands: list[Command]) -> str:
    lines = ["# fish: graft completion fish | source"]
    for program in PROGRAMS:
        for command in commands:
            start = "-n __fish_use_subcommand -f"
            lines.append(f"complete -c {program} {start} -a {command.name} -d {_quoted(command.help)}")
            inside = f"-n '__fish_seen_subcommand_from {command.name}'"
            for option in command.options:
                words = f" -f -a {_quoted(' '.join(map(str, option.choices)))}" if option.choices else ""
                if not option.option_strings:
                    lines += [f"complete -c {program} {inside}{words}"] if words else []
                    continue
                flags = " ".join(
                    f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.option_strings
                )
                value = "" if option.nargs == 0 else " -r"
                lines.append(f"complete -c {program} {inside} {flags}{value}{words} -d {_quoted(option.help or '')}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "’") + "'"
