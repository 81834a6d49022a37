//! Other programs: cargo for both workspaces, and whatever else a step calls.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::step::Step;
use crate::workspace::Workspace;

/// Why a program did not do its part.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessError {
    #[error("cannot start `{command}`")]
    Start { command: String, source: std::io::Error },
    #[error("`{command}` failed: {status}")]
    Failed { command: String, status: ExitStatus },
}

/// A cargo that works in `dir`. What `cargo run` told this program about itself is not passed on:
/// build scripts that watch those variables would run again for nothing.
pub(crate) fn cargo(workspace: &Workspace, dir: &Path) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(dir)
        .stdin(Stdio::null())
        .env("CARGO_TARGET_DIR", &workspace.target);
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let own = ["CARGO_PKG_", "CARGO_BIN_"]
            .iter()
            .any(|prefix| text.starts_with(prefix));
        if own || ["CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_CRATE_NAME"].contains(&text.as_ref()) {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs to the end, its output going where ours goes.
pub(crate) fn run(command: &mut Command) -> Result<(), ProcessError> {
    let status = command.status().map_err(|source| ProcessError::Start {
        command: line(command),
        source,
    })?;
    check(command, status)
}

/// Runs to the end and returns what it printed; its stderr goes where ours goes.
pub(crate) fn capture(command: &mut Command) -> Result<Vec<u8>, ProcessError> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .map_err(|source| ProcessError::Start {
            command: line(command),
            source,
        })?;
    check(command, output.status)?;
    Ok(output.stdout)
}

/// Runs to the end, saying now and then that it goes on. stdout is for results: its goes to stderr.
pub(crate) fn run_patiently(command: &mut Command, step: &mut Step, what: &str) -> Result<(), ProcessError> {
    let start = |source, command: &Command| ProcessError::Start {
        command: line(command),
        source,
    };
    command.stdin(Stdio::null()).stdout(std::io::stderr());
    let mut child = command.spawn().map_err(|source| start(source, command))?;
    loop {
        if let Some(status) = child.try_wait().map_err(|source| start(source, command))? {
            return check(command, status);
        }
        step.waiting(what);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The first of `candidates` that runs with `--version`.
pub(crate) fn first_working(candidates: &[&[&str]]) -> Option<Vec<String>> {
    let works = |words: &&&[&str]| {
        let [program, rest @ ..] = **words else {
            return false;
        };
        let mut command = Command::new(program);
        command
            .args(rest)
            .arg("--version")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    candidates
        .iter()
        .find(works)
        .map(|words| words.iter().map(|&word| word.to_owned()).collect())
}

/// A program of that name in `PATH`.
pub(crate) fn in_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|dir| dir.join(format!("{name}{}", env::consts::EXE_SUFFIX)))
        .find(|path| path.is_file())
}

fn check(command: &Command, status: ExitStatus) -> Result<(), ProcessError> {
    if status.success() {
        return Ok(());
    }
    Err(ProcessError::Failed {
        command: line(command),
        status,
    })
}

fn line(command: &Command) -> String {
    let program = Path::new(command.get_program())
        .file_name()
        .unwrap_or(command.get_program());
    std::iter::once(program)
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_command_and_how_it_ended() {
        let err = run(Command::new("sh").args(["-c", "exit 7"])).unwrap_err();
        assert_eq!(err.to_string(), "`sh -c exit 7` failed: exit status: 7");
        let err = run(&mut Command::new("no-such-program-here")).unwrap_err();
        assert!(
            err.to_string().starts_with("cannot start `no-such-program-here`"),
            "{err}"
        );
        assert_eq!(
            capture(Command::new("sh").args(["-c", "echo hi"])).unwrap(),
            b"hi\n"
        );
    }

    #[test]
    fn finds_the_first_program_that_works() {
        assert_eq!(
            first_working(&[&["no-such-program-here"], &["cargo"]]),
            Some(vec!["cargo".to_owned()])
        );
        assert_eq!(first_working(&[&["no-such-program-here"]]), None);
    }
}
