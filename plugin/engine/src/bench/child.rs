//! Each measurement is a process of its own: its peak memory is its own, and it finds nothing warm that
//! another left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use cinch_protocol::probe::{Plan, Report};

use super::options::{Runner, System};

/// Starts the measured processes, one after another.
pub(crate) struct Children {
    program: PathBuf,
    config: PathBuf,
    overrides: Vec<String>,
    /// Of the plans and reports; removed at the end.
    dir: PathBuf,
}

impl Children {
    /// Of this program, with a configuration made of `config` and `overrides`.
    pub(crate) fn new(config: &Path, overrides: &[String]) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("cinch-bench-{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        Ok(Self {
            program: std::env::current_exe().context("finding this program")?,
            config: config.to_owned(),
            overrides: overrides.to_vec(),
            dir,
        })
    }

    /// Runs `plan` on `system`.
    pub(crate) fn run(&self, system: &System, plan: &Plan) -> Result<Report> {
        let (path, out) = (self.dir.join("plan.json"), self.dir.join("report.json"));
        fs::write(&path, serde_json::to_vec(plan)?).context("writing the plan")?;
        let mut command = self.command(system);
        command
            .args([&path, &out])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let name = format!("{} {}", system.name, system.kv);
        let status = command
            .status()
            .with_context(|| format!("{name}: cannot start {}", command.get_program().display()))?;
        if !status.success() {
            bail!("{name}: the measured process failed: {status}");
        }
        let text = fs::read(&out).with_context(|| format!("{name}: reading its report"))?;
        // A report that a later process fails to write must not be taken for its own.
        fs::remove_file(&out).context("removing a report that was read")?;
        serde_json::from_slice(&text).with_context(|| format!("{name}: its report"))
    }

    fn command(&self, system: &System) -> Command {
        match &system.run {
            Runner::Other(words) => {
                // Checked: never empty.
                let mut command = Command::new(words.first().map_or("", String::as_str));
                command.args(words.iter().skip(1));
                command
            }
            Runner::Cinch(set) => {
                let mut command = Command::new(&self.program);
                command.args(["probe", "--config"]).arg(&self.config);
                // Said once by the parent; a user's own choice comes later and wins.
                command.args(["--set", "log.level=warn"]);
                for set in self.overrides.iter().chain(set) {
                    command.args(["--set", set]);
                }
                command
            }
        }
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        // It is in the folder for temporary files: left behind, it harms nobody.
        let _left = fs::remove_dir_all(&self.dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> System {
        System {
            name: "x".into(),
            kv: "f16".into(),
            run: Runner::Other(["sh", "-c", script, "sh"].map(String::from).to_vec()),
            max_concurrency: None,
        }
    }

    #[test]
    fn a_report_is_of_its_own_process() {
        let children = Children::new(Path::new("c.toml"), &["a.b=1".into()]).unwrap();
        let plan = Plan::default();
        let wrote = children.run(
            &shell("grep -q groups $1 && echo '{\"group_seconds\":[1.5],\"runs\":[]}' >$2"),
            &plan,
        );
        assert_eq!(wrote.unwrap().group_seconds, [1.5]);
        let said = |script| format!("{:#}", children.run(&shell(script), &plan).unwrap_err());
        assert!(said("exit 3").contains("x f16: the measured process failed: exit status: 3"));
        assert!(said("true").contains("x f16: reading its report"));
        assert!(said("echo {} >$2").contains("x f16: its report"));

        let cinch = System {
            run: Runner::Cinch(vec!["kv.plugin=off".into()]),
            ..shell("")
        };
        let command = children.command(&cinch);
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
        assert_eq!(
            words.join(" "),
            "probe --config c.toml --set log.level=warn --set a.b=1 --set kv.plugin=off"
        );
    }
}
