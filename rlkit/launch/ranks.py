"""`python -m rlkit.launch.ranks N COMMAND ...`: a command of rlkit on N ranks, under the supervisor's eyes.

accelerate's own launcher runs in this process, which answers the supervisor for all ranks.
"""

import sys

from accelerate.commands.launch import launch_command, launch_command_parser

from rlkit.launch.supervisor import follow


def main() -> None:
    """Until all ranks have ended; a rank that fails ends the others and this process with status 1."""
    follow()
    count, *command = sys.argv[1:]
    # --multi_gpu names the launcher of several ranks, on CPUs too; --cpu would start one.
    ranks = [
        "--multi_gpu",
        "--num_processes",
        count,
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    launch_command(launch_command_parser().parse_args([*ranks, "--main_process_port", "0", "-m", "rlkit", *command]))


if __name__ == "__main__":
    main()
