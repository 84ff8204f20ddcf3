"""The description of the environment."""

from expo.run.environment import describe_environment


def test_environment_names_versions_and_machine():
    environment = describe_environment()
    assert environment["versions"]["torch"]
    assert environment["machine"]["cpus"] >= 1
