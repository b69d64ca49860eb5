//! A program moves to another process while it runs, over TCP: first its registers, then each page when it is touched, and
//! the rest in the background (post-copy).
//!
//! ```sh
//! cargo run --release --example migrate -- [MIB]
//! ```
//!
//! Both processes run on this machine and connect by loopback. Any kernel; no rights from Linux 5.11 on.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{env, thread};

use userfaultfd::LazyMemory;
use userfaultfd::pager::{FillOrder, PageData, PageSource};
use userfaultfd_examples::Result;

/// Tells this program, executed once more, to take the program over.
const DESTINATION: &str = "--destination";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let mib = match &arguments[..] {
        [flag, address] if flag == DESTINATION => {
            return userfaultfd_examples::run(|| destination(address.parse()?));
        }
        [] => Some(16),
        [mib] => mib.parse::<usize>().ok().filter(|mib| *mib > 0),
        _ => None,
    };
    let Some(bytes) = mib.and_then(|mib| mib.checked_mul(1 << 20)) else {
        eprintln!("usage: cargo run --example migrate -- [MIB]");
        return ExitCode::FAILURE;
    };
    userfaultfd_examples::run(|| source(bytes))
}

/// The registers of the program that moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Machine {
    step: u64,
    sum: u64,
}

impl Machine {
    const STEPS: u64 = 200_000;
    const BYTES: usize = 16;

    /// Runs until a step. Each step reads a word at a random place, and writes another value there.
    fn run(&mut self, memory: &mut [u8], until: u64) {
        let words = (memory.len() / 8) as u64;
        while self.step < until {
            self.step += 1;
            let index = (self.step.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % words;
            let word = memory[8 * index as usize..].first_chunk_mut().expect("the word is in the memory");
            let value = u64::from_le_bytes(*word);
            self.sum = self.sum.rotate_left(1) ^ value;
            *word = value.wrapping_mul(31).wrapping_add(self.step).to_le_bytes();
        }
    }

    fn send(&self, mut stream: &TcpStream) -> io::Result<()> {
        stream.write_all([self.step, self.sum].map(u64::to_le_bytes).as_flattened())
    }

    fn receive(mut stream: &TcpStream) -> io::Result<Self> {
        let mut bytes = [[0; 8]; Self::BYTES / 8];
        stream.read_exact(bytes.as_flattened_mut())?;
        let [step, sum] = bytes.map(u64::from_le_bytes);
        Ok(Self { step, sum })
    }
}

fn source(bytes: usize) -> Result<()> {
    let mut memory: Vec<u8> =
        (0..bytes as u64 / 8).flat_map(|at| at.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()).collect();
    // What the program comes to if it stays.
    let mut stays = Machine::default();
    stays.run(&mut memory.clone(), Machine::STEPS);

    let mut machine = Machine::default();
    machine.run(&mut memory, Machine::STEPS / 2);

    // The program stands still from here until the destination has its registers.
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut destination = Command::new(env::current_exe()?);
    let mut destination = destination.args([DESTINATION, &listener.local_addr()?.to_string()]).spawn()?;
    let mut control = accept(&listener, &mut destination)?;
    control.write_all(&(bytes as u64).to_le_bytes())?;
    machine.send(&control)?;
    println!("source: {} steps, then handed {} bytes over", machine.step, Machine::BYTES);

    // Pages, on as many connections as the destination opens.
    let memory: Arc<[u8]> = memory.into();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let memory = Arc::clone(&memory);
            thread::spawn(move || {
                if let Err(error) = stream.and_then(|stream| send_pages(&stream, &memory)) {
                    eprintln!("source: a connection failed: {error}");
                }
            });
        }
    });

    let moved = Machine::receive(&control)?;
    if !destination.wait()?.success() {
        return Err("the destination failed".into());
    }
    if moved != stays {
        return Err(format!("the program came to {moved:?}, and to {stays:?} without moving").into());
    }
    println!("source: the program came to what it comes to without moving: {:016x}", moved.sum);
    Ok(())
}

/// Waits for the first connection, unless the destination ends without one.
fn accept(listener: &TcpListener, destination: &mut Child) -> Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(status) = destination.try_wait()? {
            return Err(format!("the destination didn't connect: {status}").into());
        }
        thread::sleep(Duration::from_millis(1));
    };
    listener.set_nonblocking(false)?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Answers requests, each an offset and a length, until the other side closes the connection.
fn send_pages(mut stream: &TcpStream, memory: &[u8]) -> io::Result<()> {
    let mut request = [[0; 8]; 2];
    loop {
        match stream.read_exact(request.as_flattened_mut()) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        let [offset, len] = request.map(|number| u64::from_le_bytes(number) as usize);
        let pages = offset.checked_add(len).and_then(|end| memory.get(offset..end));
        stream.write_all(pages.ok_or(io::ErrorKind::InvalidInput)?)?;
    }
}

/// The pages of the source. As many connections as there are reads at a time.
struct Remote {
    address: SocketAddr,
    idle: Mutex<Vec<TcpStream>>,
}

impl PageSource for Remote {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let reused = idle().pop();
        let mut stream = match reused {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(self.address)?;
                stream.set_nodelay(true)?;
                stream
            }
        };
        // A connection that fails is closed. The pager calls again, and gets a new one.
        stream.write_all([offset, page.len() as u64].map(u64::to_le_bytes).as_flattened())?;
        stream.read_exact(page)?;
        idle().push(stream);
        Ok(PageData::Data)
    }
}

fn destination(address: SocketAddr) -> Result<()> {
    let mut control = TcpStream::connect(address)?;
    let mut len = [0; 8];
    control.read_exact(&mut len)?;
    let mut machine = Machine::receive(&control)?;

    // Nothing of the memory is here. The program runs on at once, and what it touches comes first.
    let start = Instant::now();
    let remote = Remote { address, idle: Mutex::default() };
    let mut memory = LazyMemory::builder(remote).len(u64::from_le_bytes(len).try_into()?).build()?;
    let background = memory.background(FillOrder::Ascending)?;
    machine.run(&mut memory, Machine::STEPS);
    let ran = start.elapsed();

    // The source may end when everything is here.
    let outcome = background.wait();
    if let Some(failed) = outcome.failed.first() {
        return Err(format!("some pages didn't come: {failed:?}").into());
    }
    println!("destination: ran on for {ran:.1?}, {} pages came by faults", memory.statistics().faults());
    println!("destination: all {} bytes are here after {:.1?}", outcome.done, start.elapsed());
    machine.send(&control)?;
    Ok(())
}
