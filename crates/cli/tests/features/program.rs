// A program with Rust's standard library: threads, panics, thread-local variables, arguments, exit status.
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::mpsc;
use std::thread;

struct Noisy(&'static str);

impl Drop for Noisy {
    fn drop(&mut self) {
        println!("end of {}", self.0);
    }
}

thread_local! {
    static WORDS: RefCell<Vec<String>> = RefCell::new(vec!["first".into()]);
    static NOISY: Noisy = const { Noisy("a thread") };
}

fn main() {
    println!("{:?}", std::env::args().skip(1).collect::<Vec<_>>());
    for number in 0..3 {
        let words = thread::spawn(move || {
            NOISY.with(|_| ());
            WORDS.with_borrow_mut(|words| words.push(number.to_string()));
            WORDS.take().join(" ")
        });
        println!("{}", words.join().unwrap());
    }
    let caught = std::panic::catch_unwind(|| {
        let _noisy = Noisy("a scope");
        panic!("expected");
    });
    println!("{:?}", caught.unwrap_err().downcast_ref::<&str>());
    let (sender, receiver) = mpsc::channel();
    let squares: HashMap<u64, u64> = (0..1000).map(|number| (number, number * number)).collect();
    thread::scope(|scope| {
        scope.spawn(|| sender.send(squares.values().sum::<u64>()).unwrap());
    });
    println!("{} {:?}", receiver.recv().unwrap(), "x12".parse::<i32>());
    std::process::exit(17);
}
