//! A program that serves until it is told to stop. Invariant: none outlives the `Service` that started it.

use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};

use super::ready::is_ready;

/// How long one that was told to stop may take before it is killed. The engine lets running requests finish for
/// `server.drain_seconds`, 10 by default.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks at it.
const TICK: Duration = Duration::from_millis(50);

/// One running program.
pub(crate) struct Service {
    name: &'static str,
    child: Child,
    ended: Option<ExitStatus>,
    probe: (SocketAddr, &'static str),
}

impl Service {
    /// Starts it; `probe` is where it answers 200 once it is ready.
    pub(crate) fn start(
        name: &'static str,
        mut command: Command,
        probe: (SocketAddr, &'static str),
    ) -> anyhow::Result<Self> {
        command.stdin(Stdio::null());
        // A group of its own: Ctrl-C reaches it through us, once, not from the terminal as well.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command
            .spawn()
            .with_context(|| format!("starting {}", command.get_program().to_string_lossy()))?;
        Ok(Self {
            name,
            child,
            ended: None,
            probe,
        })
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Whether it answers that it is ready.
    pub(crate) fn ready(&self) -> bool {
        is_ready(self.probe.0, self.probe.1)
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            let status = self.child.try_wait();
            self.ended = status.with_context(|| format!("waiting for the {}", self.name))?;
        }
        Ok(self.ended)
    }

    /// Tells it to stop, as Ctrl-C would.
    pub(crate) fn interrupt(&mut self) -> anyhow::Result<()> {
        if self.ended()?.is_some() {
            return Ok(());
        }
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .context("its process id")?;
        match kill_process(pid, Signal::INT) {
            // It ended by itself a moment ago.
            Err(rustix::io::Errno::SRCH) => Ok(()),
            result => result.with_context(|| format!("stopping the {}", self.name)),
        }
    }

    /// Tells it to stop and waits for that; one that does not is killed.
    pub(crate) fn stop(&mut self) -> anyhow::Result<ExitStatus> {
        self.interrupt()?;
        let told = Instant::now();
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if told.elapsed() > PATIENCE {
                self.child
                    .kill()
                    .with_context(|| format!("killing the {}", self.name))?;
            }
            std::thread::sleep(TICK);
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Err(err) = self.stop() {
            eprintln!("error: {err:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOWHERE: (SocketAddr, &str) = (
        SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1),
        "/",
    );

    fn shell(script: &str) -> Service {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Service::start("shell", command, NOWHERE).unwrap()
    }

    #[test]
    fn an_interrupt_reaches_it_and_an_ended_one_is_no_error() {
        let mut service = shell("trap 'exit 3' INT; while :; do sleep 0.01; done");
        // The trap is set when the shell gets to it.
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(service.ended().unwrap(), None);
        assert!(!service.ready());
        assert_eq!(service.stop().unwrap().code(), Some(3));
        service.interrupt().unwrap();
    }

    #[test]
    fn it_does_not_outlive_its_owner() {
        let service = shell("exec sleep 600");
        let pid = Pid::from_raw(i32::try_from(service.child.id()).unwrap()).unwrap();
        drop(service);
        assert_eq!(
            rustix::process::test_kill_process(pid),
            Err(rustix::io::Errno::SRCH)
        );
    }
}
